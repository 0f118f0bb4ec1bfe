"""nanochat through the loop: tokens, converted layers, recomputed blocks, what is under test, and a sample in the record."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from mango import data, models
from mango.data.tokenizer import Tokenizer
from mango.errors import ConfigError
from mango.models.gpt import GPT
from mango.models.sampling import generate
from mango.telemetry import MemoryLedger
from mango.training import checkpoint, record
from mango.training.config import RunConfig, RunSpec, TierConfig, resolve, validated
from mango.training.loop import train
from mango.training.mole import MoleRun
from mango.training.record import RunRecord
from mango.training.yamlfile import parse

README = Path(__file__).resolve().parents[1] / "README.md"
TIER = """
tier: test
experiments:
  nanochat:
    seeds: [0]
    minutes: 1
    data: {name: text, source: embedded, train: 60000, test: 1500, validation: 1000, sequence: 16, vocabulary: 300}
    model: {name: gpt, depth: 1, heads: 2, kv_heads: 1, ffn: 4}
    exclude: [embedding, head]
    under_test: [feedforward]
    train: {steps: 8, batch: 8, eval_every: 4, eval_batch: 16, log_every: 2, checkpoint_every: 3, schedule: warmdown, sample: 12}
    controls: {dense: adamw, frozen: frozen}
    variants:
      adamw: {optimizer: adamw, options: {lr: 3e-3}}
      frozen: {optimizer: adamw, options: {lr: 3e-3}, freeze: true}
      recompute: {optimizer: adamw, options: {lr: 3e-3}, recompute: true}
      exact: {optimizer: adamw, options: {lr: 3e-3}, mole: {store: dense, norms: false}}
      int4: {optimizer: adamw, options: {lr: 3e-3}, mole: {store: int4}}
      factored:
        {optimizer: mole, options: {lr: 3e-3}, mole: {gradient: factored, rank: 0.25, targets: all, exclude: [head], diagnostics_every: 4}}
"""


@pytest.fixture(scope="module")
def tier() -> TierConfig:
    return validated(TierConfig, parse(TIER, "test"), "test")


@pytest.fixture(autouse=True, scope="module")
def _isolated(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANGO_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("MANGO_DATA", "")
        yield


def spec(tier: TierConfig, variant: str, *overrides: str, seed: int = 0) -> RunSpec:
    return resolve(tier, "nanochat", variant, seed, list(overrides))


@pytest.fixture(scope="module")
def runs(tier: TierConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {variant: tmp_path_factory.mktemp("runs") / variant for variant in tier.experiments["nanochat"].variants}
    for variant, folder in folders.items():
        train(spec(tier, variant), folder)
    return folders


@pytest.fixture(scope="module")
def records(runs: dict[str, Path]) -> dict[str, RunRecord]:
    return {variant: record.load(folder / "run.json") for variant, folder in runs.items()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model.pt", weights_only=True)["model"]


def lines(folder: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "time"} for row in rows]


def test_the_tokenizer_is_kept_and_the_loss_is_told_in_bits_per_byte(runs: dict[str, Path], records: dict[str, RunRecord]) -> None:
    found, tokenizer = records["adamw"], Tokenizer((runs["adamw"] / "tokenizer.json").read_text())
    assert len(tokenizer) == 300 == weights(runs["adamw"])["head.weight"].shape[0]
    assert found.throughput.unit == "tokens/s"
    loaded = data.load("text", source="embedded", train=60_000, test=1500, validation=1000, sequence=16, vocabulary=300)
    assert loaded.files()["tokenizer.json"] == tokenizer.text
    final = found.metrics.final
    assert final.test_bits_per_byte == pytest.approx(loaded.scores("test", final.test_loss, 0.0)["bits_per_byte"])
    assert final.test_bits_per_byte < final.test_loss / torch.log(torch.tensor(2.0)).item(), "a token is more than a byte"


def test_the_sample_is_what_the_saved_model_writes(runs: dict[str, Path], records: dict[str, RunRecord]) -> None:
    loaded = data.load("text", source="embedded", train=60_000, test=1500, validation=1000, sequence=16, vocabulary=300)
    model = models.get("gpt", **loaded.model_arguments(), depth=1, heads=2, kv_heads=1, ffn=4)
    model.load_state_dict(weights(runs["int4"]))
    tokens = generate(model, loaded.encode("\n")[None], 12, temperature=0.8, seed=0)[0, 1:]
    assert records["int4"].sample == loaded.decode(tokens) and len(tokens) == 12
    assert records["int4"].sample != records["frozen"].sample


def test_only_what_is_under_test_is_frozen(tier: TierConfig, runs: dict[str, Path], records: dict[str, RunRecord]) -> None:
    torch.manual_seed(0)
    start = GPT(300, **spec(tier, "frozen").config.model.model_dump(exclude={"name"})).state_dict()
    for name, weight in weights(runs["frozen"]).items():
        assert torch.equal(weight, start[name]) == ("feedforward" in name), name
    assert {found.parameters.compressed for found in records.values()} == {2 * 4 * 64 * 64}
    with pytest.raises(ConfigError, match=r"under_test = 'mlp' is not legal: a regular expression that is found in a parameter's"):
        train(spec(tier, "adamw", "under_test=[mlp]"), runs["adamw"].parent / "none")


def test_blocks_that_are_computed_again_train_alike_and_keep_less(runs: dict[str, Path], records: dict[str, RunRecord]) -> None:
    assert lines(runs["recompute"]) == lines(runs["adamw"])
    assert records["recompute"].memory.gradients == records["adamw"].memory.gradients
    deep = {}
    for recompute in (False, True):  # one block is all that is alive at a time: it shows with several
        torch.manual_seed(0)
        model = GPT(300, depth=4, width=64, heads=2)
        model.recompute = recompute
        ledger = MemoryLedger(model)
        with ledger.activations():
            model(torch.arange(256)[None] % 300).square().mean().backward()
        deep[recompute] = ledger.saved_activations
    assert deep[True] < 0.5 * deep[False]


def test_converted_layers_train_through_the_same_loop(runs: dict[str, Path], records: dict[str, RunRecord]) -> None:
    exact, dense = weights(runs["exact"]), weights(runs["adamw"])
    assert exact.keys() == dense.keys()
    for name, weight in exact.items():
        assert torch.allclose(weight, dense[name], atol=2e-3), name  # AdamW divides rounding by rounding where gradients vanish
    assert records["exact"].metrics.final.test_loss == pytest.approx(records["adamw"].metrics.final.test_loss, abs=1e-4)
    assert abs(records["int4"].metrics.final.test_loss - records["adamw"].metrics.final.test_loss) < 0.05
    assert records["int4"].memory.saved_activations < records["adamw"].memory.saved_activations
    assert records["adamw"].mole is None and records["int4"].mole is not None
    assert "blocks.0.feedforward" in records["int4"].mole.converted and records["int4"].mole.skipped == {}


def test_layers_tell_of_their_gradients_in_the_metrics(runs: dict[str, Path], records: dict[str, RunRecord]) -> None:
    rows = [row for row in lines(runs["factored"]) if row["split"] == "mole"]
    assert {row["step"] for row in rows} == {4, 8}
    layers = {f"blocks.0.{name}" for name in ("attention.query", "attention.out", "feedforward.up", "feedforward.down")}
    assert layers <= {row["layer"] for row in rows}
    assert all(0.0 < row["energy_capture"] <= 1.0 + 1e-6 for row in rows)
    kept = {row["layer"].rpartition(".")[2]: row["layer_memory_usage"] for row in rows}
    readers = ("query", "key", "value", "up")
    assert kept["out"] > 0 and not any(kept[name] for name in readers), "what a norm keeps exactly is not kept again"
    assert not [row for row in lines(runs["int4"]) if row["split"] == "mole"]
    assert records["factored"].memory.gradients < records["int4"].memory.gradients, "no gradient of a converted matrix is formed"


@pytest.mark.parametrize("variant", ["int4", "factored"])
def test_a_converted_model_resumes_bit_for_bit(tier: TierConfig, runs: dict[str, Path], tmp_path: Path, variant: str) -> None:
    class Crash(Exception):
        pass

    def stop(kind: str, done: int, total: int) -> None:
        if kind == "steps" and done == 5:
            raise Crash

    with pytest.raises(Crash):
        train(spec(tier, variant), tmp_path, progress=stop)
    saved = checkpoint.load(tmp_path / "checkpoint.pt")
    assert train(spec(tier, variant), tmp_path, resume=True).resumed == [3]
    assert lines(tmp_path) == lines(runs[variant])
    for fields in ({"rank": 3}, {"rank": 0.5}, {"store": "int2"}, {"store": "sketch", "rank": 8}, {"gradient": "formed"}):
        model = GPT(300, **spec(tier, variant).config.model.model_dump(exclude={"name"}))
        model.load_state_dict(saved["model"])
        changed = MoleRun(model, {**spec(tier, variant).config.mole, **fields}, lambda row: None)
        changed.load_state_dict(saved["mole"])  # another rank, store or gradient takes up what it can use
        assert changed.state_dict()["blocks.0.feedforward.up"]["steps"] == 3
        model(torch.arange(32)[None]).square().mean().backward()


def test_fields_of_mole_are_reached_by_set_and_checked(tier: TierConfig, tmp_path: Path) -> None:
    assert spec(tier, "adamw", "mole.store=int2", "mole.rank=8").config.mole == {"store": "int2", "rank": 8}
    assert spec(tier, "int4", "mole=null").config.hash() == spec(tier, "adamw").config.hash()
    with pytest.raises(ConfigError, match=r"mole\.store = 'int3' is not legal"):
        train(spec(tier, "int4", "mole.store=int3"), tmp_path)
    with pytest.raises(ConfigError, match=r"mole = 'sotre' is not legal: one of the fields store"):
        train(spec(tier, "int4", "mole.sotre=int4"), tmp_path)
    task = {"data": {"name": "digits"}, "model": {"name": "resnet"}, "train": {"steps": 2, "batch": 2}, "optimizer": "adamw"}
    for field, value in (("recompute", {"recompute": True}), ("train.sample", {"train": {"steps": 2, "batch": 2, "sample": 3}})):
        with pytest.raises(ConfigError, match=rf"{field} = .* is not legal: model\.name = gpt alone has it"):
            validated(RunConfig, task | value, "x")


def test_readmes_three_lines_convert_a_model() -> None:
    """The block that README shows, run as it stands on a model of ours."""
    (block,) = (text for text in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "convert(model" in text)
    assert len([line for line in block.splitlines() if line]) <= 3
    model = GPT(256, depth=1, width=64, heads=2)
    names = {"model": model}
    exec(block, names)
    assert "blocks.0.feedforward: MLP with relu2, store int4" in str(names["report"]) and "head" not in names["report"].converted
    model(torch.arange(32)[None]).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
