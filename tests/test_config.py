"""The configuration: shipped tiers, schema files, overrides, and what a mistake in a file is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_training import ROOT, TIER, spec

from mango.errors import ConfigError
from mango.training import schema
from mango.training.config import TierConfig, load, resolve
from mango.training.yamlfile import parse


@pytest.fixture
def tier_file(tmp_path: Path) -> Path:
    path = tmp_path / "test.yaml"
    path.write_text(TIER)
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "workflow" / "config").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_tier_is_valid_and_every_run_of_it_resolves(path: Path) -> None:
    tier = load(path)
    assert tier.tier == path.stem
    for name, experiment in tier.experiments.items():
        for variant in experiment.variants:
            assert resolve(tier, name, variant, experiment.seeds[0]).config.train == experiment.train


@pytest.mark.parametrize("name", sorted(schema.SCHEMAS))
def test_the_schema_files_are_what_the_models_export(name: str) -> None:
    assert (ROOT / "workflow" / "schemas" / f"{name}.schema.json").read_text() == schema.export(name)


@pytest.mark.parametrize("path", sorted((ROOT / "workflow" / "config").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_exported_schema_accepts_shipped_tiers_and_rejects_an_unknown_key(path: Path) -> None:
    import jsonschema

    validator = jsonschema.Draft202012Validator(json.loads(schema.export("config")))
    content = parse(path.read_text(), str(path))
    assert not list(validator.iter_errors(content))
    next(iter(content["experiments"].values()))["train"]["stepz"] = 3
    assert any("stepz" in error.message for error in validator.iter_errors(content))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 16", "stepz: 16", "experiments.digits.train.stepz is an unknown key (value 16): the keys here are autocast, batch,"),
        ("steps: 16", "steps: 0", "experiments.digits.train.steps = 0 is not legal: greater than or equal to 1"),
        ("steps: 16", "steps: 16.5", "experiments.digits.train.steps = 16.5 is not legal: integer"),
        ("warmup: 2", "warmup: 16", "experiments.digits.train.warmup = 16 is not legal: fewer than the 16 steps"),
        ("name: resnet,", "name: vgg,", "experiments.digits.model.name = 'vgg' is not legal: one of 'resnet', 'resnet18'"),
        ("stem: patch2", "stem: patch3", "experiments.digits.model.stem = 'patch3' is not legal: 'conv', 'patch2'"),
        ("blocks: [1, 1]", "blocks: [1, 0]", "experiments.digits.model.blocks.1 = 0 is not legal"),
        (
            "width: 16",
            "widht: 16",
            "experiments.digits.model.widht is an unknown key (value 16): the keys here are blocks, name, stem, width",
        ),
        (
            "{name: resnet, width: 16, blocks: [1, 1], stem: patch2}",
            "{name: gpt}",
            "experiments.digits.model.name = 'gpt' is not legal: one of resnet, resnet18, resnet50, vit, for data.name = digits",
        ),
        (
            "name: text,",
            "name: digits,",
            "experiments.text.data.sequence is an unknown key (value 32): the keys here are augment, evaluate",
        ),
        ("frozen: frozen}", "frozen: frzen}", "experiments.digits.controls.frozen = 'frzen' is not legal: one of adamw"),
        ("seeds: [0, 1]", "seeds: []", "experiments.digits.seeds = [] is not legal"),
        ("minutes: 1", "", "experiments.digits.minutes is missing"),
        ("plan: {rank: 0.25}}}\n  text", "}, vary: {rank: []}}\n  text", "experiments.digits.variants.mango.vary.rank = [] is not legal"),
        ("muon: {", "muon: {vary: {rank: [0.5, 0.5]}, ", "the variant muon-rank-0.5 is not legal: one of its name exists"),
        ("tier: test", "tier: test\ntier: other", "the key 'tier' is given twice"),
        ("tier: test", "tier: [", "not valid YAML"),
    ],
)
def test_a_bad_tier_file_is_named_with_field_value_and_what_is_legal(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TIER
    path = tmp_path / "bad.yaml"
    path.write_text(TIER.replace(old, new))
    with pytest.raises(ConfigError) as error:
        load(path)
    assert str(path) in str(error.value)
    assert message in " ".join(str(error.value).split())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "key=value"),
        ("train.stepz=3", "train.stepz is an unknown key (value 3)"),
        ("trian.steps=3", "one of data, model, options, train"),
        ("foo=1", "foo is an unknown key"),
        ("data.source=lokal", "data.source = 'lokal' is not legal: 'auto', 'local', 'download' or 'embedded'"),
        ("train.steps=[", "not valid YAML"),
        ("options.exclude=[head]", "options.exclude = ['head'] is not legal: the matrices under test are the task's"),
        ("train.clip=.inf", "train.clip = inf is not legal: a finite number"),
    ],
)
def test_a_bad_override_is_named(tier_file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        spec(tier_file, "adamw", override)
    assert message in str(error.value)


def test_vary_makes_one_more_variant_for_every_value(tmp_path: Path) -> None:
    path = tmp_path / "tier.yaml"
    text = "{rank: 0.25}}, grid: {lr: [1]}, vary: {rank: [0.5], residual: [false]}}\n  text"
    path.write_text(TIER.replace("{rank: 0.25}}}\n  text", text))
    tier = load(path)
    found = {name: variant for name, variant in tier.experiments["digits"].variants.items() if name.startswith("mango")}
    assert list(found) == ["mango", "mango-rank-0.5", "mango-residual-false"]
    assert [variant.label for variant in found.values()] == ["Mango", "Mango, rank 0.5", "Mango, residual false"]
    plans = [variant.options["plan"] for variant in found.values()]
    assert plans == [{"rank": 0.25}, {"rank": 0.5}, {"rank": 0.25, "residual": False}], "one field alone"
    assert [bool(variant.grid) for variant in found.values()] == [True, False, False], "they were not tuned"
    assert TierConfig.model_validate(tier.model_dump()) == tier, "what was expanded is not expanded again"


def test_overrides_reach_the_run_and_change_its_hash(tier_file: Path) -> None:
    plain = spec(tier_file, "mango")
    changed = spec(tier_file, "mango", "options.lr=1e-4", "options.plan.rank=3", "train.steps=9", "options.betas=[0.8, 0.9]")
    assert changed.config.options == {"lr": 1e-4, "plan": {"rank": 3}, "betas": [0.8, 0.9]}
    assert changed.config.train.steps == 9
    assert changed.config.hash() != plain.config.hash()
    assert spec(tier_file, "mango", seed=1).config.hash() == plain.config.hash()


def test_yaml_reads_exponents_as_numbers() -> None:
    assert parse("[3e-3, 1E5, -2e+1, 3.5e-1, 7]", "here") == [0.003, 1e5, -20.0, 0.35, 7]
    assert parse("[e5, 3e, '3e-3']", "here") == ["e5", "3e", "3e-3"]


def test_a_variant_may_have_seeds_of_its_own(tier_file: Path) -> None:
    chosen = load(tier_file).experiments["text"]
    assert (chosen.seeds_of("adamw"), chosen.seeds_of("mango")) == ([0, 1, 2], [0])
