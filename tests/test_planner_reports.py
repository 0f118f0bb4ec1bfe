"""Reports of the planner, and its command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_planner import fill_gradients, next_token, target_of, tiny_llama

from mango import LayerPlan, Mango, cli
from mango.compat import transformers
from mango.errors import ConfigError
from mango.models.gpt import GPT
from mango.planner import GPUS, gpus, methods, plan, target

GIB = 1 << 30


# ---------------------------------------------------------------- reports


def tiny_report(**options: Any) -> Any:
    module = GPT(999, depth=2, width=128, heads=2)
    return plan(target_of(module, next_token), **{"seq": 64, "batch": 2, "reserve": 0} | options)


def test_longest_is_the_last_length_that_fits() -> None:
    card = GPUS["rtx3090"].nbytes
    reserve = card - 40 * 2**20
    report = tiny_report(gpu="rtx3090", reserve=reserve, methods=["adamw", "mango-budget"])
    assert report.usable == 40 * 2**20 and report.exact
    for row in report.rows:
        assert row.fits == (row.longest >= report.seq)
        at, beyond = (
            tiny_report(gpu="rtx3090", reserve=reserve, seq=size, methods=[row.method]).rows[0] for size in (row.longest, row.longest + 1)
        )
        assert at.fits and at.peak <= report.usable < beyond.peak and not beyond.fits


def test_peak_lies_between_the_largest_category_and_the_sum() -> None:
    for row in tiny_report(methods=["adamw", "adafactor", "galore+fused", "mango", "mango+fused"]).rows:
        sizes = (row.weights, row.gradients, row.state, row.activations, row.workspace)
        assert row.weights + row.state + max(row.gradients, row.activations) <= row.peak <= sum(sizes)


def test_a_fused_step_keeps_the_largest_gradient_alone() -> None:
    rows = {row.method: row for row in tiny_report(dtype="fp32", methods=["adamw", "adamw-fp32", "mango", "mango+fused"]).rows}
    assert rows["mango+fused"].gradients == 4 * 999 * 128
    assert rows["mango"].gradients == rows["mango"].weights
    assert rows["mango+fused"].peak <= rows["mango"].peak
    assert rows["adamw"].state == rows["adamw-fp32"].state


def test_the_budget_fills_the_card_and_a_real_optimizer_has_the_bytes_of_the_row() -> None:
    module = GPT(999, depth=2, width=128, heads=2)
    report = plan(
        target_of(module, next_token),
        "rtx3090",
        seq=64,
        batch=2,
        dtype="fp32",
        methods=["mango+fused", "mango-budget"],
        reserve=GPUS["rtx3090"].nbytes - 14 * 2**20,
    )
    fixed, filled = report.rows
    assert filled.fits and filled.peak <= report.usable
    assert filled.longest >= fixed.longest
    assert sum(entry["layers"] for entry in filled.plans) == 2 + 2 * 6
    left = {tuple(entry["shape"]): [] for entry in filled.plans}
    for entry in filled.plans:
        left[tuple(entry["shape"])] += [entry["plan"]] * entry["layers"]
    built = Mango([{"params": [param], "plan": left[tuple(param.shape)].pop()} for param in module.parameters()])
    fill_gradients(module)
    built.step()
    assert built.nbytes() == filled.state


def test_a_card_that_is_too_small_says_so() -> None:
    report = tiny_report(gpu="rtx3090", reserve=GPUS["rtx3090"].nbytes - 2**20, methods=["adamw", "mango-budget"])
    assert all(not row.fits and row.longest == 0 for row in report.rows)
    assert report.rows[-1].plans and report.rows[-1].longest_plans is None


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("d12", 2 * 65536 * 768 + 12 * 12 * 768**2), ("llama-7b", 6_738_415_616), ("resnet50", 25_557_032), ("vit-b16", 86_567_656)],
)
def test_parameters_are_those_that_the_authors_state(name: str, parameters: int) -> None:
    assert target(name).parameters == parameters


def test_images_are_planned_by_the_batch() -> None:
    report = plan("resnet50", "rtx3090", batch=4, methods=["adamw"])
    assert report.axis == "batch" and report.exact and report.rows[0].longest > 4
    with pytest.raises(ConfigError, match="seq = 128 is not legal: left out"):
        plan("resnet50", seq=128)


def test_a_hugging_face_configuration_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_llama().to_dict()))
    report = plan(str(path), seq=64, methods=["adamw"])
    assert report.parameters == sum(param.numel() for param in transformers("a test").LlamaForCausalLM(tiny_llama()).parameters())
    for text, message in (("{", "a JSON file"), ("[]", "model_type"), ('{"model_type": "unheard of"}', "transformers knows")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            plan(str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "gpt5"}, "model = 'gpt5' is not legal: one of nanochat-d"),
        ({"model": "llama-8b"}, "model = 'llama-8b'"),
        ({"model": "d0"}, "model.depth = 0"),
        ({"gpu": "rtx1"}, "gpu = 'rtx1' is not legal: one of rtx3090"),
        ({"seq": 0}, "seq = 0"),
        ({"batch": 0}, "batch = 0"),
        ({"dtype": "int8"}, "dtype = 'int8'"),
        ({"rank": 2.0}, "plan.rank"),
        ({"methods": ["sgd"]}, "method = 'sgd'"),
        ({"reserve": "25GiB"}, "reserve = '25GiB' is not legal: less than"),
        ({"reserve": "some"}, "reserve = 'some'"),
    ],
)
def test_bad_input_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        plan(**{"model": "d1", "gpu": "rtx3090"} | options)


def test_every_card_leaves_the_reserve() -> None:
    for name, card in GPUS.items():
        assert gpus.find(name) is card and card.nbytes > 20 * GIB > gpus.RESERVE


# ---------------------------------------------------------------- the command


def test_the_command_prints_a_table_json_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--model", "llama-micro", "--gpu", "rtx4090", "--seq", "64", "--batch", "2"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert all((name in out) == (each.mole is None) for name, each in methods.METHODS.items()) and "longest context" in out
    figure = tmp_path / "plan.pdf"
    assert cli.main([*arguments, "--json", "--method", "mango-budget", "--method", "adamw", "--figure", str(figure)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in report["rows"]] == ["mango-budget", "adamw"]
    assert LayerPlan.of(report["rows"][0]["plans"][0]["plan"])
    assert figure.read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("more", [["--rank", "many"], ["--figure", "plan.txt"], ["--figure", "/nowhere/plan.pdf"], ["--reserve", "1 TiB"]])
def test_the_command_refuses_bad_input_in_one_line(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", "d1", *more]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and err.startswith("mango: error: ")


@pytest.mark.parametrize("depth", [1, 2, 5, 7, 12, 13, 20])
def test_nanochat_of_every_depth_has_its_width(depth: int) -> None:
    model = target(f"d{depth}").module
    assert model.embedding.weight.shape == (65536, 64 * depth) and len(model.blocks) == depth
    assert model.channels % 2 == 0 and 64 * depth % model.channels == 0
