"""The whole artifact on tiny settings, in a copy of the working tree: real snakemake, papermill and LaTeX."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import checkout
import pytest
import yaml

SETTINGS = "workflow/config/smoke.yaml"
VARIANTS = ("adamw", "frozen", "galore", "mango")
LANGUAGE = ("adamw", "frozen", "mango")
NANOCHAT = ("adamw", "frozen", "int4")
ABSENT = (
    "ablation-language",
    "imagenet-cnn",
    "imagenet-vit",
    "llama-pretrain",
    "llama-finetune",
    "llama-sentiment",
)  # a tier may leave them out
THEOREMS = ("T1", "T2")


def shrink(path: Path) -> None:
    """The smoke tier with fewer steps, images and theorems, on the embedded data, and a variant that Mango's codecs do not touch."""
    settings = yaml.safe_load(path.read_text())
    experiment = settings["experiments"]["cifar10"]
    experiment["data"] |= {"source": "embedded", "train": 200, "test": 60}
    experiment["train"] |= {"steps": 8, "batch": 20, "eval_every": 4, "log_every": 2, "checkpoint_every": 4, "warmup": 1}
    experiment["variants"]["galore"] = {
        "label": "GaLore",
        "optimizer": "galore",
        "options": {"lr": 0.01, "rank": 0.125},
        "grid": {"lr": [0.003, 0.01]},
    }
    experiment["variants"] = {name: experiment["variants"][name] for name in VARIANTS}
    language = settings["experiments"]["language"]
    language["data"] |= {"source": "embedded", "train": 20_000, "test": 2000, "validation": 0}
    language["train"] |= {"steps": 4, "batch": 8, "eval_every": 2, "log_every": 2, "checkpoint_every": 2, "warmup": 1}
    language["variants"] = {name: language["variants"][name] for name in LANGUAGE}
    nanochat = settings["experiments"]["nanochat"]
    nanochat["data"] |= {"source": "embedded", "train": 20_000, "test": 2000, "validation": 0}
    nanochat["train"] |= {"steps": 4, "eval_every": 2, "log_every": 2, "checkpoint_every": 2, "warmup": 1}
    nanochat["variants"] = {name: nanochat["variants"][name] for name in NANOCHAT}
    for name in ABSENT:
        del settings["experiments"][name]
    settings["policy"] |= {"policies": ["static", "tinyformer"]}
    settings["theory"] = {"seed": 0, "theorems": list(THEOREMS)}
    path.write_text(yaml.safe_dump(settings, sort_keys=False))


@dataclass
class Artifact:
    folder: Path
    output: str  # of the first run

    def snakemake(self, *arguments: str, settings: str = SETTINGS) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"MANGO_CACHE": str(self.folder / "cache")}
        command = [sys.executable, "-m", "snakemake", *arguments, "--configfile", settings]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=3600)

    def pending(self) -> set[str]:
        """The messages of the jobs that a run would start now."""
        planned = self.snakemake("--dry-run")
        assert planned.returncode == 0, planned.stderr
        return set(re.findall(r"^Job \d+: (.*)$", planned.stdout + planned.stderr, re.MULTILINE))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = checkout.copy(tmp_path_factory.mktemp("artifact"))
    shrink(folder / SETTINGS)
    made = Artifact(folder, "")
    done = made.snakemake()
    made.output = done.stdout + done.stderr
    assert done.returncode == 0, made.output[-6000:]
    return made


def test_one_command_makes_records_figures_numbers_and_the_pdf(artifact: Artifact) -> None:
    smoke = artifact.folder / "results/smoke"
    assert {path.parent.parent.name for path in smoke.glob("cifar10/*/0/run.json")} == set(VARIANTS)
    assert {path.parent.parent.name for path in smoke.glob("language/*/0/run.json")} == set(LANGUAGE)
    assert {path.stem for path in smoke.glob("theory/*.json")} == set(THEOREMS)
    assert json.loads((smoke / "data/cifar10.json").read_text())["title"] == "digits (embedded stand-in)"
    assert json.loads((smoke / "data/language.json").read_text())["title"] == "Python's documentation (embedded stand-in)"
    for notebook in ("01_cifar10", "02_theory", "03_optimizer", "05_policy"):
        assert json.loads((smoke / f"figures/{notebook}/numbers.json").read_text())
    pdf = artifact.folder / "paper/build/smoke/mango.pdf"
    assert pdf.read_bytes().startswith(b"%PDF") and pdf.stat().st_size > 50_000
    assert not (artifact.folder / "paper/build/mango.pdf").exists(), "that one is the laptop tier's"


def test_every_figure_is_an_output_so_that_the_report_shows_it(artifact: Artifact) -> None:
    """But those that are drawn only where archived runs take their place."""
    listed = artifact.snakemake("--summary")
    outputs = {line.split("\t")[0] for line in listed.stdout.splitlines()}
    figures = (artifact.folder / "results/smoke/figures").glob("*/*.png")
    made = {path.relative_to(artifact.folder).as_posix() for path in figures if not path.stem.startswith("live_")}
    assert "results/smoke/figures/02_theory/codecs.png" in made
    assert made <= outputs, listed.stderr


def test_it_uses_the_default_profile_and_shows_progress(artifact: Artifact) -> None:
    assert "profiles/default" in artifact.output
    assert f"Training cifar10: {VARIANTS[0]}, seed 0" in artifact.output
    assert "(100%) done" in artifact.output


def test_a_second_run_has_nothing_to_do(artifact: Artifact) -> None:
    again = artifact.snakemake("--cores", "all")
    assert again.returncode == 0 and "Nothing to be done" in again.stdout + again.stderr


DOWNSTREAM = {"Generating the paper's numbers, tables and statements", "Typesetting paper/build/smoke/mango.pdf"}
IMAGES, BOUNDS, LOSSES = (f"Running notebooks/{name}.ipynb" for name in ("01_cifar10", "02_theory", "03_optimizer"))
RUNS = {f"Training cifar10: {variant}, seed 0" for variant in VARIANTS}
TEXTS = {f"Training language: {variant}, seed 0" for variant in LANGUAGE}
TOKENS = {f"Training nanochat: {variant}, seed 0" for variant in NANOCHAT} | {"Preparing the data of nanochat"}
KEPT = {"Measuring memory against context length", "Running notebooks/04_molegrad.ipynb"}
JUDGED = {"Judging policies on held-out tasks", "Running notebooks/05_policy.ipynb"}
MANGO = {"Training cifar10: mango, seed 0", "Training language: mango, seed 0"}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("mango/codecs/nf4.py", {*MANGO, "Checking theorem T1", IMAGES, BOUNDS, LOSSES, *JUDGED, *DOWNSTREAM}),
        ("mango/compressors/lowrank.py", {"Checking theorem T2", BOUNDS, *DOWNSTREAM}),
        ("mango/data/text.py", {"Preparing the data of language", *TEXTS, *TOKENS, *KEPT, LOSSES, *DOWNSTREAM}),
        ("mango/models/resnet.py", {*RUNS, IMAGES, LOSSES, *JUDGED, *DOWNSTREAM}),
        ("mango/policy/scalarize.py", {*JUDGED, *DOWNSTREAM}),
        ("paper/sections/abstract.tex", {"Typesetting paper/build/smoke/mango.pdf"}),
    ],
)
def test_touching_a_source_reruns_exactly_what_depends_on_it(artifact: Artifact, path: str, expected: set[str]) -> None:
    source = artifact.folder / path
    before, status = source.read_bytes(), source.stat()
    try:
        source.write_bytes(before + b"\n")
        assert artifact.pending() == expected
    finally:
        source.write_bytes(before)
        os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_nothing_is_pending_once_the_sources_are_as_they_were(artifact: Artifact) -> None:
    assert artifact.pending() == set()


def test_report_holds_the_figures(artifact: Artifact) -> None:
    assert artifact.snakemake("--report", "results/smoke/report.html").returncode == 0
    report = (artifact.folder / "results/smoke/report.html").read_text()
    for word in ("Figures", "Theorems", "Run records", "Paper", "pareto"):
        assert word in report


def test_tuning_records_every_value_and_the_chosen_one(artifact: Artifact) -> None:
    done = artifact.snakemake("tuning")
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads((artifact.folder / "results/smoke/tuning/all.json").read_text())
    losses = {point["options"]["lr"]: point["loss"] for point in found["points"]}
    assert set(losses) == {0.003, 0.01}
    assert found["chosen"] == {"lr": min(losses, key=lambda rate: losses[rate])}
    run = json.loads(next(artifact.folder.glob("results/smoke/tuning/cifar10/galore/*/run.json")).read_text())
    assert run["config"]["data"]["evaluate"] == "validation", "never on the test set"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("steps: 8", "stepz: 8"), "experiments.cifar10.train.stepz"),
        (("optimizer: galore", "optimizer: galoer"), "optimizer = 'galoer' is not legal: one of"),
        (("- T2", "- T99"), "theory.theorems = 'T99' is not legal"),
    ],
)
def test_bad_settings_are_one_line_before_any_job(artifact: Artifact, change: tuple[str, str], message: str) -> None:
    bad = artifact.folder / "bad.yaml"
    bad.write_text((artifact.folder / SETTINGS).read_text().replace(*change))
    done = artifact.snakemake(settings="bad.yaml")
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode == 2 and len(lines) == 1 and message in lines[0]
    assert "Traceback" not in done.stderr and "Job" not in done.stdout


def test_lint_is_clean(artifact: Artifact) -> None:
    done = artifact.snakemake("--lint")
    assert done.returncode == 0, done.stdout + done.stderr


def test_workflow_is_formatted() -> None:
    command = [sys.executable, "-m", "snakefmt", "--check", "Snakefile", "workflow/rules"]
    done = subprocess.run(command, cwd=checkout.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
