"""The workflow's parts: settings, dependency hashes, rules, profiles and scripts. ``test_end_to_end.py`` runs the whole."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from mango import data
from mango.errors import ConfigError
from mango.training.config import load, resolve

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "workflow" / "scripts"
sys.path.insert(0, str(SCRIPTS))

import codehash  # noqa: E402
import jobs  # noqa: E402
import verify  # noqa: E402

TIERS = sorted((ROOT / "workflow" / "config").glob("*.yaml"))
RULES = sorted((ROOT / "workflow" / "rules").glob("*.smk"))


def files(roots: list[str], root: Path = ROOT) -> set[str]:
    """The files behind a hash, ``__init__`` statements left out."""
    return {piece for piece in codehash.pieces(roots, root) if ":" not in piece}


# ---------------------------------------------------------------- dependency hashes


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small package: ``main`` uses one name of a package's ``__init__`` and one of two functions of a module."""
    for name, text in {
        "pkg/__init__.py": "from pkg.other import unused\nfrom pkg.tools import helper\nTABLE = {'a': 'pkg.a:A'}\n",
        "pkg/a.py": "from pkg.deep import depth\nclass A:\n    x = depth\n",
        "pkg/deep.py": "depth = 1\n",
        "pkg/tools.py": "import pkg.deep as d\nfrom pkg import other\nhelper = int\ndef second():\n    return d.depth + other.unused\n",
        "pkg/other.py": "unused = 2\n",
        "pkg/main.py": "import typing\nimport pkg\nif typing.TYPE_CHECKING:\n    from pkg.deep import depth\ngo = pkg.helper()\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_hash_follows_names_and_not_files(tree: Path) -> None:
    assert files(["pkg.main"], tree) == {"pkg/main.py", "pkg/tools.py"}
    assert files(["pkg.tools:second"], tree) == {"pkg/tools.py", "pkg/deep.py", "pkg/other.py"}
    assert files(["pkg.a:A"], tree) == {"pkg/a.py", "pkg/deep.py"}


def test_hash_counts_a_reached_module_byte_by_byte(tree: Path) -> None:
    before = codehash.digest(["pkg.main"], tree)
    (tree / "pkg/tools.py").write_text((tree / "pkg/tools.py").read_text() + "# a comment\n")
    assert codehash.digest(["pkg.main"], tree) != before


def test_hash_counts_of_a_package_only_what_is_used(tree: Path) -> None:
    before = codehash.digest(["pkg.main"], tree)
    init = tree / "pkg/__init__.py"
    init.write_text(init.read_text() + "NEW = 3\n")
    assert codehash.digest(["pkg.main"], tree) == before
    init.write_text(init.read_text().replace("from pkg.tools import helper", "from pkg.other import unused as helper"))
    assert codehash.digest(["pkg.main"], tree) != before
    (tree / "pkg/deep.py").write_text("depth = 5\n")
    assert codehash.digest(["pkg.main"], tree) == codehash.digest(["pkg.main"], tree)


def test_hash_follows_imports_inside_functions_and_modules_used_as_objects(tree: Path) -> None:
    (tree / "pkg/late.py").write_text("def f():\n    from pkg.a import A\n    return A\n")
    (tree / "pkg/whole.py").write_text("from pkg import tools\nkeep = [tools]\n")
    (tree / "pkg/place.py").write_text("import pkg\nhere = pkg.__file__\n")
    assert "pkg/deep.py" in files(["pkg.late:f"], tree)
    assert files(["pkg.place"], tree) == {"pkg/place.py"}
    assert files(["pkg.whole"], tree) == {"pkg/whole.py", "pkg/tools.py", "pkg/deep.py", "pkg/other.py"}


def test_hash_follows_the_names_that_a_package_serves_lazily(tree: Path) -> None:
    lazy = "if TYPE_CHECKING:\n    from pkg.a import A\n    from pkg.other import unused\ndef __getattr__(name):\n    ...\n"
    (tree / "pkg/__init__.py").write_text(lazy)
    (tree / "pkg/user.py").write_text("from pkg import A\nprint(A)\n")
    assert files(["pkg.user"], tree) == {"pkg/user.py", "pkg/a.py", "pkg/deep.py"}


def test_hash_reads_the_code_cells_of_a_notebook(tree: Path) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["from pkg import other"]},
        {"cell_type": "code", "source": ["%time\n", "from pkg.a import A\n", "A()"]},
    ]
    (tree / "n.ipynb").write_text(json.dumps({"cells": cells}))
    assert files(["n.ipynb"], tree) == {"n.ipynb", "pkg/a.py", "pkg/deep.py"}


def test_hash_refuses_a_root_that_is_not_there(tree: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"pkg\.absent"):
        codehash.digest(["pkg.absent"], tree)


def variants_that_use(path: str, tier: str = "laptop") -> set[str]:
    settings = load(ROOT / f"workflow/config/{tier}.yaml")
    found = settings.experiments["cifar10"].variants
    return {name for name in found if path in files(jobs.run_modules(resolve(settings, "cifar10", name, 0).config))}


def test_a_codec_reruns_the_variants_whose_plan_names_it_and_no_others() -> None:
    variants = load(ROOT / "workflow/config/laptop.yaml").experiments["cifar10"].variants
    mango = {name for name, variant in variants.items() if variant.optimizer == "mango"}
    keeps_error = {name for name in mango if variants[name].options.get("plan", {}).get("error", "codec") == "codec"}
    assert keeps_error and mango - keeps_error
    assert variants_that_use("mango/codecs/nf4.py") == keeps_error
    assert variants_that_use("mango/codecs/fp4.py") == set()
    assert variants_that_use("mango/codecs/cast.py") == mango
    assert variants_that_use("mango/training/loop.py") == set(variants)


def test_an_experiment_depends_on_its_own_kind_of_data_and_model() -> None:
    settings = load(ROOT / "workflow/config/laptop.yaml")
    images, text = {"mango/data/images.py", "mango/models/resnet.py"}, {"mango/data/text.py", "mango/models/gpt.py"}
    for experiment, own, other in (("cifar10", images, text), ("language", text, images)):
        found = files(jobs.run_modules(resolve(settings, experiment, "adamw", 0).config))
        assert own <= found and not other & found
    assert jobs.data_code(settings, "cifar10") != jobs.data_code(settings, "language")


def test_a_notebook_reads_the_archives_where_the_tier_lacks_an_experiment() -> None:
    smoke, laptop = (load(ROOT / "workflow" / "config" / f"{tier}.yaml") for tier in ("smoke", "laptop"))
    archived = jobs.notebook_records(laptop, "llama-sentiment")
    assert all(path.startswith("results/archive/") for path in archived)
    live = [f"results/smoke/llama-sentiment/{variant}/0/run.json" for variant in smoke.experiments["llama-sentiment"].variants]
    assert jobs.notebook_records(smoke, "llama-sentiment") == live + archived


def test_a_variant_runs_its_own_seeds() -> None:
    settings = load(ROOT / "workflow/config/laptop.yaml")
    seeds: dict[str, list[int]] = {}
    for variant, seed in jobs.runs(settings, "language"):
        seeds.setdefault(variant, []).append(seed)
    assert seeds["mango"] == [0, 1, 2] and seeds["mango-noerror"] == [0]
    assert {f"results/laptop/language/mango-noerror/{seed}/run.json" for seed in range(3)} & set(
        jobs.notebook_records(settings, "language")
    ) == {"results/laptop/language/mango-noerror/0/run.json"}


def test_a_theorem_declares_every_codec_that_it_names() -> None:
    """Registry names are strings, which no import shows: the modules that a theorem declares must cover those in its file."""
    from mango import codecs
    from theory import THEOREMS

    for theorem in THEOREMS:
        covered = files(jobs.theorem_modules(theorem))
        text = (ROOT / f"{THEOREMS.module(theorem).replace('.', '/')}.py").read_text()
        for name in codecs.REGISTRY:
            if re.search(rf'codec\w*(?:\.get\(|=|\()\s*"{name}"', text, re.IGNORECASE):
                assert codecs.REGISTRY.module(name).replace(".", "/") + ".py" in covered, (theorem, name)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("path", TIERS, ids=lambda path: path.stem)
def test_every_tier_is_valid(path: Path) -> None:
    schema = json.loads((ROOT / "workflow/schemas/config.schema.json").read_text())
    content = yaml.safe_load(path.read_text())
    jsonschema.Draft202012Validator(schema).validate(content)
    settings = jobs.settings(str(path), content, content)
    assert settings.tier == path.stem


def test_the_laptop_tier_declares_less_than_half_an_hour() -> None:
    settings = load(ROOT / "workflow/config/laptop.yaml")
    assert sum(experiment.minutes for experiment in settings.experiments.values()) < 23, "set-up takes up to seven of the thirty minutes"


def test_settings_come_from_one_file() -> None:
    smoke = str(ROOT / "workflow/config/smoke.yaml")
    content = yaml.safe_load(Path(smoke).read_text())
    with pytest.raises(ConfigError, match="settings come from one file"):
        jobs.settings(smoke, content | {"tier": "laptop"}, content)
    with pytest.raises(ConfigError, match="one file"):
        jobs.settings_file([smoke, smoke])
    assert jobs.settings_file([smoke]) == "workflow/config/smoke.yaml"


def test_changing_one_variant_changes_its_own_jobs_only() -> None:
    before = load(ROOT / "workflow/config/smoke.yaml")
    content = before.model_dump(exclude_unset=True)
    content["experiments"]["cifar10"]["variants"]["mango"]["options"]["lr"] = 0.5
    after = type(before).model_validate(content)
    changed = {
        name
        for name in before.experiments["cifar10"].variants
        if jobs.run_settings(before, "cifar10", name) != jobs.run_settings(after, "cifar10", name)
    }
    assert changed == {"mango"}


@pytest.mark.usefixtures("own_folders")
def test_the_default_tier_has_data_where_nobody_brought_any() -> None:
    """The first command of the README, on a machine without a data folder."""
    found = {}
    for name, task in load(ROOT / "workflow" / "config" / "laptop.yaml").experiments.items():
        arguments = task.data_arguments()
        if arguments not in found.values():
            found[name] = arguments
            assert data.load(**arguments).source == "embedded", name
    assert len(found) > 3


# ---------------------------------------------------------------- rules, profiles, notebooks


def test_every_rule_says_what_it_does_and_what_it_takes() -> None:
    for path in RULES:
        for name, body in re.findall(r"^ *rule (\w*):\n((?:(?: .*)?\n)+)", path.read_text(), re.MULTILINE):
            for keyword in ("message", "log"):
                assert f"{keyword}:" in body, (path.name, name, keyword)
            if name not in ("tuning", "policy"):  # they gather a few files
                for keyword in ("benchmark:", "threads:", "mem_mb=", "runtime=", "code="):
                    assert keyword in body, (path.name, name, keyword)


def test_cluster_profiles_repeat_the_shared_keys() -> None:
    """A profile that is named replaces the default one."""
    profiles = {path.parent.name: yaml.safe_load(path.read_text()) for path in (ROOT / "profiles").glob("*/config.yaml")}
    assert set(profiles) == {"default", "slurm", "kubernetes"}
    assert profiles["default"]["cores"] == "all"
    for name in ("slurm", "kubernetes"):
        assert profiles[name]["executor"] == name
        for key in set(profiles["default"]) - {"cores", "resources"}:
            assert profiles[name][key] == profiles["default"][key], (name, key)


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_declare_the_parameters_that_the_rule_passes(path: Path) -> None:
    """papermill only warns about a parameter that a notebook does not have."""
    passed = set(re.findall(r"-p (\w+) ", (ROOT / "workflow/rules/notebooks.smk").read_text()))
    assert passed == {"tier", "results", "out"}
    cells = json.loads(path.read_text())["cells"]
    (cell,) = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    declared = [line.partition("=")[0].strip() for line in "".join(cell["source"]).splitlines() if line and not line.startswith("#")]
    assert set(declared) == passed and len(declared) == len(passed)
    assert all(not cell.get("outputs") for cell in cells), "outputs are stripped in git"


# ---------------------------------------------------------------- scripts


def stub(folder: Path, name: str, body: str) -> dict[str, str]:
    """The environment with a command of ours first on PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_train_script_resumes_only_what_the_same_key_began(tmp_path: Path) -> None:
    calls, out = tmp_path / "calls", tmp_path / "run"
    environment = stub(tmp_path / "bin", "python", f'echo "${{@: -1}}" >>{calls}; [ ! -e {tmp_path}/fail ]')

    def attempt(key: str, fail: bool) -> str:
        (tmp_path / "fail").touch() if fail else (tmp_path / "fail").unlink(missing_ok=True)
        done = subprocess.run(["bash", str(SCRIPTS / "train.sh"), str(out), key, "cifar10", "--seed", "0"], env=environment)
        assert (done.returncode != 0) == fail
        return calls.read_text().split()[-1]

    assert attempt("a", fail=True) == "--force", "nothing to continue"
    assert attempt("a", fail=True) == "--resume", "cut off under the same key"
    assert attempt("b", fail=True) == "--force", "other code or settings"
    assert attempt("b", fail=False) == "--resume"
    assert attempt("b", fail=False) == "--force", "a completed run that is asked for again starts over"


@pytest.mark.parametrize(("tests", "smoke", "code"), [(0, 0, 0), (1, 0, 1), (0, 3, 1)])
def test_ci_ends_with_the_closing_line_of_the_suite(tmp_path: Path, tests: int, smoke: int, code: int) -> None:
    make = (
        f'case $1 in test) echo "....."; echo "7 passed in 3.21s"; exit {tests};; smoke) cat; echo "a page of output"; exit {smoke};; esac'
    )
    done = subprocess.run(
        ["bash", str(ROOT / ".ci" / "run")], env=stub(tmp_path / "bin", "make", make), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code
    assert done.stdout.splitlines()[-1] == "7 passed in 3.21s"


def test_ci_fails_when_no_test_ran(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / ".ci" / "run")], env=stub(tmp_path / "bin", "make", "exit 0"), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == "no test ran"


def results(folder: Path, accuracy: float, fingerprint: str = "f" * 64) -> Path:
    """A tier with one experiment and one theorem."""
    values = {"mango.accuracy": accuracy, "mango.accuracy_std": 0.01, "mango.state": 0.75, "mango.label": "Mango", "mango.recovered": None}
    values |= {"gap": 0.2, "galore.recovered": 0.7, "galore.recovered_std": None, "galore.loss": 2.0}
    values |= {"muon.recovered": 1.2, "muon.recovered_std": 0.03}
    contents: dict[str, Any] = {
        "laptop/data/cifar10.json": {"title": "CIFAR-10", "fingerprint": fingerprint},
        "laptop/theory/T1.json": {"id": "T1", "measured": 0.5},
        "laptop/figures/01_cifar10/numbers.json": {f"cifar10.live.{key}": {"value": value} for key, value in values.items()},
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def run_verify(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPTS / "verify.py"), "laptop", "--results", str(folder), *arguments], capture_output=True, text=True
    )


def test_verify_compares_with_the_reference_for_the_same_data(tmp_path: Path) -> None:
    assert run_verify(tmp_path).returncode == 2, "nothing to compare"
    assert run_verify(results(tmp_path, 0.70), "--record").returncode == 0
    assert run_verify(results(tmp_path, 0.72)).returncode == 0, "within three standard deviations"
    outside = run_verify(results(tmp_path, 0.60))
    assert outside.returncode == 1 and "FAIL cifar10.mango.accuracy: 0.6" in outside.stdout
    other = run_verify(results(tmp_path, 0.60, fingerprint="e" * 64))
    assert other.returncode == 0 and "no reference for CIFAR-10" in other.stdout, "other data are not compared"


def test_verify_tolerances_are_those_of_the_seeds_where_they_are_wider(tmp_path: Path) -> None:
    values = verify.live(results(tmp_path, 0.70), "laptop")["experiments"]["cifar10"]["f" * 64]["values"]
    assert values["mango.accuracy"]["tolerance"] == pytest.approx(0.03)
    assert values["mango.state"]["tolerance"] == pytest.approx(0.75e-9)
    assert values["muon.recovered"]["tolerance"] == pytest.approx(0.09)
    assert values["galore.recovered"]["tolerance"] == pytest.approx(0.03 * 2.0 / 0.2), "of one run: what its loss may be off, over the gap"
    assert set(values) == {"mango.accuracy", "mango.state", "gap", "galore.recovered", "galore.loss", "muon.recovered"}


def test_readme_shows_the_committed_reference_values() -> None:
    done = subprocess.run([sys.executable, str(SCRIPTS / "readme.py"), "--check"], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, "run workflow/scripts/readme.py"
