"""The notebooks: stripped, one parameters cell that the workflow's arguments fit, and running on real records from either folder."""

from __future__ import annotations

import importlib
import json
import math
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from tiny import ROOT, TIER, executed, tiny_results

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def parameters(path: Path) -> list[str]:
    cells = [cell for cell in nbformat.read(path, 4).cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(cells) == 1, f"{path.name}: exactly one cell is tagged parameters"
    return cells[0].source.splitlines()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
    assert notebook.metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_one_parameter_per_line(path: Path) -> None:
    """papermill reads no others, and only warns of those it does not know."""
    for line in parameters(path):
        code = line.partition("#")[0]
        assert re.fullmatch(r"\w+ = \S.*", code.strip()), line
        assert ";" not in code, line


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_workflow_passes_parameters_that_exist(path: Path) -> None:
    passed = set(re.findall(r" -p (\w+) ", (ROOT / "workflow" / "rules" / "notebooks.smk").read_text()))
    assert passed, "the workflow passes parameters"
    assert passed <= {line.split(" = ")[0] for line in parameters(path)}


def test_workflow_expects_the_figures_that_notebooks_save() -> None:
    """Every figure that the rules declare is saved by the notebook of that name."""
    declared = re.findall(r'"(\d\d_\w+)": \[([^\]]*)\]', (ROOT / "workflow" / "rules" / "notebooks.smk").read_text())
    assert {name for name, _ in declared} == {path.stem for path in NOTEBOOKS}
    for name, figures in declared:
        source = "\n".join(cell.source for cell in nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4).cells)
        saved = set(re.findall(r'common\.save\(.*, out, "(\w+)"\)', source))
        assert set(re.findall(r'"(\w+)"', figures)) <= saved


def test_image_classification_notebook_runs_on_real_records() -> None:
    out = executed("01_cifar10")
    for figure in ("curves", "pareto", "recovered", "contraction"):
        assert (out / f"{figure}.pdf").read_bytes().startswith(b"%PDF")
        assert (out / f"{figure}.png").stat().st_size > 5000
    numbers = json.loads((out / "numbers.json").read_text())
    record = json.loads((tiny_results() / TIER / "cifar10" / "mango" / "0" / "run.json").read_text())
    assert numbers["cifar10.data"]["value"] == record["data"]["title"] == "digits (embedded stand-in)"
    assert numbers["cifar10.headline"]["value"] == "mango"
    assert numbers["cifar10.mango-no-scouts.ablates"]["value"] == "without scouts"
    assert numbers["cifar10.dense"]["value"] == "adamw" and numbers["cifar10.frozen"]["value"] == "frozen"
    expected = record["memory"]["optimizer_state"] / record["parameters"]["total"]
    assert numbers["cifar10.mango.state"]["value"] == pytest.approx(expected, rel=1e-12)
    assert numbers["cifar10.contraction.count"]["value"] > 0
    assert all(entry["tier"] == TIER and entry["source"] == "notebooks/01_cifar10.ipynb" for entry in numbers.values())


def test_optimizer_notebook_reads_both_experiments() -> None:
    out = executed("03_optimizer")
    for figure in ("pareto", "curves", "recovered", "contraction"):
        assert (out / f"{figure}.pdf").read_bytes().startswith(b"%PDF")
        assert (out / f"{figure}.png").stat().st_size > 5000
    numbers = json.loads((out / "numbers.json").read_text())
    record = json.loads((tiny_results() / TIER / "language" / "mango" / "0" / "run.json").read_text())
    final = record["metrics"]["final"]
    assert numbers["language.data"]["value"] == "Python's documentation (embedded stand-in)"
    assert numbers["language.metric"]["value"] == "bits_per_byte"
    assert numbers["language.mango.bits_per_byte"]["value"] == pytest.approx(final["test_loss"] / math.log(2))
    assert numbers["language.under_test"]["value"] == record["parameters"]["compressed"] / record["parameters"]["total"]
    assert (numbers["language.dense"]["value"], numbers["language.frozen"]["value"]) == ("adamw", "frozen")
    assert numbers["language.headline"]["value"] == "mango"
    assert numbers["language.mango-noerror.ablates"]["value"] == "without error feedback"
    assert numbers["language.mango-noerror.loss_std"]["value"] is None, "one seed"
    assert numbers["language.contraction.count"]["value"] > 0
    assert (out / "ablation.pdf").read_bytes().startswith(b"%PDF")
    assert numbers["ablation-language.variants"]["value"].count("mango") == 1 and numbers["ablation-language.runs"]["value"] == 3
    assert numbers["ablation-language.mango-rank-0.25.label"]["value"] == "Mango, rank 0.25"
    assert numbers["ablation-language.mango-error-none.ablates"]["value"] == "without error feedback"
    assert not any(key.startswith("cifar10.") for key in numbers), "those are the other notebook's"


def test_a_text_of_an_untrained_model_can_be_printed() -> None:
    molegrad = importlib.import_module("molegrad")
    assert molegrad.excerpt(" a\x01\ufffd\u00e9 ??? b?\n c ") == "a\u00b7\u00b7\u00b7 ? b? c"
    assert len(molegrad.excerpt("x" * 1000)) == 160


def test_vision_notebook_reads_both_experiments() -> None:
    out = executed("06_vision")
    for figure in ("pareto", "curves_cnn", "curves_vit", "recovered_cnn", "recovered_vit"):
        assert (out / f"{figure}.pdf").stat().st_size > 1000
    numbers = json.loads((out / "numbers.json").read_text())
    for name in ("imagenet-cnn", "imagenet-vit"):
        assert "stand-in" in numbers[f"{name}.data"]["value"] and numbers[f"{name}.mango.seeds"]["value"] == 1
        assert numbers[f"{name}.gap_passes"]["value"] is False, "two steps decide nothing"


def test_molegrad_notebook_tells_converted_models_apart() -> None:
    out = executed("04_molegrad")
    for figure in ("recovered", "kept", "energy", "contexts", "curves"):
        assert (out / f"{figure}.pdf").read_bytes().startswith(b"%PDF")
        assert (out / f"{figure}.png").stat().st_size > 5000
    numbers = {key: entry["value"] for key, entry in json.loads((out / "numbers.json").read_text()).items()}
    records = {
        name: json.loads((tiny_results() / TIER / "nanochat" / name / "0" / "run.json").read_text())
        for name in ("adamw", "an-int4", "int2")
    }
    assert (numbers["nanochat.dense"], numbers["nanochat.frozen"]) == ("adamw", "frozen"), "by settings, whatever comes first by name"
    assert numbers["nanochat.headline"] == "an-int4"
    groups = {name: numbers[f"nanochat.{name}.group"] for name in numbers["nanochat.variants"]}
    assert groups == {
        **dict.fromkeys(("adamw", "frozen"), "control"),
        **dict.fromkeys(("recompute", "muon"), "peer"),
        **dict.fromkeys(("an-int4", "int2", "int4-muon", "factored", "sketch"), "mole"),
    }
    saved = {name: record["memory"]["saved_activations"] for name, record in records.items()}
    assert (
        numbers["nanochat.int2.kept"] == pytest.approx(saved["int2"] / saved["adamw"]) and saved["int2"] < saved["an-int4"] < saved["adamw"]
    )
    assert numbers["nanochat.energy.count"] == 2 * 6, "two periods, six matrices"
    assert 0 < numbers["nanochat.energy.lowest"] <= numbers["nanochat.energy.median"] <= 1.0 + 1e-6
    assert numbers["nanochat.contexts.measured"] is False
    assert numbers["nanochat.contexts.int2.kept"] < numbers["nanochat.contexts.int4.kept"] < 1 == numbers["nanochat.contexts.dense.kept"]


def test_policy_notebook_compares_policies_with_rules_and_oracle() -> None:
    out = executed("05_policy")
    for figure in ("costs", "decisions", "attention"):
        assert (out / f"{figure}.pdf").read_bytes().startswith(b"%PDF")
        assert (out / f"{figure}.png").stat().st_size > 5000
    numbers = {key: entry["value"] for key, entry in json.loads((out / "numbers.json").read_text()).items()}
    record = json.loads((tiny_results() / TIER / "policy" / "evaluation.json").read_text())
    rewards = {(run["ablation"], run["policy"], run["seed"]): run["reward"] for run in record["runs"]}
    assert numbers["policy.variants"] == ["static", "budget", "tinyformer", "oracle"]
    assert numbers["policy.best_rule"] in ("static", "budget") and numbers["policy.label"] == f"live {TIER}"
    assert numbers["policy.exceeded"] == 0 and numbers["policy.runs"] == 7
    assert numbers["policy.budget.as_budget"] == 1.0
    assert numbers["policy.tinyformer.behind"] == pytest.approx(rewards["", "oracle", 0] - rewards["", "tinyformer", 0])
    assert numbers["policy.ablation.full-rank.budget.reward"] == pytest.approx(rewards["full-rank", "budget", 0])
    best = {seed: max(rewards["", name, seed] for name in ("static", "budget", "tinyformer")) for seed in (0, 1)}
    best[0] = max(best[0], rewards["", "oracle", 0])
    assert numbers["policy.static.regret"] == pytest.approx(sum(best[seed] - rewards["", "static", seed] for seed in (0, 1)) / 2)
    assert numbers[f"policy.expert.{numbers['policy.expert']}.agreement"] >= 0.9
    assert -1.0 <= numbers["policy.orders"] <= 1.0


def test_archived_evaluations_of_a_higher_tier_come_first(tmp_path: Path) -> None:
    import policies

    for place, tier in (("smoke", "smoke"), ("archive/cpu-2-2026-11", "long"), ("archive/rtx5090-2025-12", "gpu")):
        path = tmp_path / place / "policy" / "evaluation.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"tier": tier}))
    labels = [found.label for found in policies.evaluations(tmp_path, "smoke")]
    assert labels == ["archived gpu (rtx5090-2025-12)", "archived long (cpu-2-2026-11)", "live smoke"]
    with pytest.raises(FileNotFoundError, match="no evaluation of policies"):
        policies.evaluations(tmp_path / "elsewhere", "smoke")


@pytest.mark.parametrize(("sign", "expected"), [(1.0, [(1, 2), (3, 5)]), (-1.0, [(1, -2), (2, -1)])])
def test_the_front_holds_what_nothing_beats(sign: float, expected: list[tuple[float, float]]) -> None:
    import figures

    points = [(1, 2), (2, 1), (3, 5), (4, 5), (1, 1.5) if sign > 0 else (1, 3)]
    assert figures.front((x, sign * y) for x, y in points).tolist() == [list(point) for point in expected]


def test_theory_notebook_runs_on_the_theorems_that_there_are() -> None:
    out = executed("02_theory")
    assert (out / "scouts.pdf").is_file() and not (out / "ef21.pdf").exists()
    numbers = json.loads((out / "numbers.json").read_text())
    record = json.loads((tiny_results() / TIER / "theory" / "T3.json").read_text())
    assert numbers["theory.T3.bound"]["value"] == record["bound"]
    assert numbers["wrong.nf4.worst"]["value"] == pytest.approx(1 - 0.8845101952, abs=1e-9)
    assert 0.008 < numbers["wrong.nf4.gaussian"]["value"] < 0.009
    assert numbers["wrong.flat.error"]["value"] == pytest.approx(1 - 32 / 1024, abs=1e-5)


def test_archived_runs_of_a_higher_tier_come_first(tmp_path: Path) -> None:
    import common

    results = tmp_path / "results"
    shutil.copytree(tiny_results() / TIER / "cifar10" / "adamw", results / TIER / "cifar10" / "adamw")
    for archive, tier in (("cpu-2-2026-01", "long"), ("cpu-2-2026-03", "long"), ("rtx5090-2025-12", "gpu")):
        target = results / "archive" / archive / "cifar10" / "adamw" / "0"
        shutil.copytree(results / TIER / "cifar10" / "adamw" / "0", target)
        record = json.loads((target / "run.json").read_text())
        (target / "run.json").write_text(json.dumps(record | {"tier": tier}))
    labels = [runs.label for runs in common.run_sets(results, TIER, "cifar10")]
    assert labels == ["archived gpu (rtx5090-2025-12)", "archived long (cpu-2-2026-03)", "archived long (cpu-2-2026-01)", "live smoke"]
    with pytest.raises(FileNotFoundError, match="no run record of 'another'"):
        common.run_sets(results, TIER, "another")


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    import common

    from mango.errors import ConfigError

    shutil.copytree(tiny_results() / TIER / "cifar10" / "adamw", tmp_path / TIER / "cifar10" / "adamw")
    path = tmp_path / TIER / "cifar10" / "adamw" / "0" / "run.json"
    path.write_text(path.read_text().replace('"steps": 4', '"steps": "four"', 1))
    with pytest.raises(ConfigError, match=r"run\.json"):
        common.run_sets(tmp_path, TIER, "cifar10")


def test_equal_data_give_equal_bytes(tmp_path: Path) -> None:
    import common
    import matplotlib.pyplot as plt

    for name in ("a", "b"):
        common.style()
        figure, axis = plt.subplots()
        axis.plot([0, 1], [0, 1], **common.looks(["x"])["x"])
        axis.set_xlabel(r"$\alpha$ against 1")
        common.save(figure, tmp_path, name)
        plt.close(figure)
    for suffix in ("pdf", "png"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_numbers_refuse_what_cannot_be_printed() -> None:
    import common

    numbers = common.Numbers("smoke", "here")
    numbers.add("a", 1.0, ".1f")
    with pytest.raises(KeyError, match="twice"):
        numbers.add("a", 2.0, ".1f")
    with pytest.raises(ValueError, match="not finite"):
        numbers.add("b", float("nan"), ".1f")


def test_llama_notebook_counts_every_byte_and_compares_with_four_bits() -> None:
    out = executed("07_llama")
    for figure in ("pretrain", "held"):
        assert (out / f"{figure}.pdf").read_bytes().startswith(b"%PDF")
    numbers = json.loads((out / "numbers.json").read_text())
    records = {
        name: json.loads((tiny_results() / TIER / "llama-finetune" / name / "0" / "run.json").read_text()) for name in ("a-lora", "mango")
    }
    for name, record in records.items():
        memory, total = record["memory"], record["parameters"]["total"]
        expected = sum(memory[key] for key in ("parameters", "gradients", "optimizer_state")) / total
        assert numbers[f"llama-finetune.{name}.held.total"]["value"] == pytest.approx(expected, rel=1e-12)
    assert numbers["llama-finetune.quantised.name"]["value"] == "a-lora"
    assert numbers["llama-finetune.dense"]["value"] == "adamw"  # not the factors, whose optimizer is the frozen control's too
    assert numbers["llama-finetune.quantised.pairs"]["value"] == 1 and numbers["llama-finetune.quantised.low"]["value"] is None
    run = json.loads((tiny_results() / TIER / "llama-pretrain" / "mango" / "1" / "run.json").read_text())
    other = json.loads((tiny_results() / TIER / "llama-pretrain" / "mango" / "0" / "run.json").read_text())
    losses = [each["metrics"]["final"]["test_loss"] for each in (run, other)]
    assert numbers["llama-pretrain.mango.perplexity"]["value"] == pytest.approx(sum(map(math.exp, losses)) / 2)


def test_llama_notebook_says_what_guessing_reaches_where_verdicts_were_trained(tmp_path: Path) -> None:
    import llama

    numbers = json.loads((executed("07_llama") / "numbers.json").read_text())
    runs = [json.loads(path.read_text()) for path in (tiny_results() / TIER / "llama-sentiment" / "adamw").glob("*/run.json")]
    assert len(runs) == 2
    assert numbers["llama-sentiment.adamw.accuracy"]["value"] == pytest.approx(
        sum(r["metrics"]["final"]["test_accuracy"] for r in runs) / 2
    )
    assert numbers["llama-sentiment.chance"]["value"] == 0.5 == runs[0]["data"]["majority"]
    assert numbers["llama-sentiment.chance_std"]["value"] == pytest.approx((0.25 / 20) ** 0.5)
    assert llama.sentiment(tmp_path, TIER) is None
