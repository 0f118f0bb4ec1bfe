"""The command line in real processes: bad input is one line on stderr and exit code 2, without a traceback, and nothing is overwritten."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mango import cli, doctor

ROOT = Path(__file__).resolve().parents[1]
TIER = """
tier: test
experiments:
  digits:
    seeds: [0]
    minutes: 1
    data: {name: cifar10, source: embedded, train: 100, test: 50}
    model: {name: resnet, width: 16, blocks: [1, 1], stem: patch2}
    train: {steps: 4, batch: 20, eval_every: 4, log_every: 2, checkpoint_every: 2}
    variants:
      adamw: {optimizer: adamw, options: {lr: 3e-3}}
      mango: {optimizer: mango, options: {lr: 3e-3}}
"""


@pytest.fixture(scope="session")
def tier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tier") / "test.yaml"
    path.write_text(TIER)
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def start(cache: Path, *arguments: object, data: object = "", **more: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MANGO_CACHE": str(cache),
        "MANGO_DATA": str(data),
        **more,
    }
    command = [sys.executable, "-m", "mango.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def run(cache: Path, *arguments: object, data: object = "") -> tuple[int, str, str]:
    process = start(cache, *arguments, data=data)
    out, err = process.communicate(timeout=180)
    return process.returncode, out, err


def one_line_error(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert code == 2, (code, out, err)
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("mango: error: ")
    return err


def train(tier: Path, out: Path, *more: object, variant: str = "adamw", experiment: str = "digits") -> list[object]:
    return ["train", experiment, "--config", tier, "--variant", variant, "--out", out, *more]


# the bars on bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"experiment": "cifar11"}, "experiment = 'cifar11' is not legal: one of digits (tier test)"),
        ({"variant": "adam"}, "variant = 'adam' is not legal: one of adamw, mango (experiment digits)"),
    ],
)
def test_unknown_experiment_and_variant(tier: Path, cache: Path, tmp_path: Path, arguments: dict[str, str], words: str) -> None:
    assert words in one_line_error(run(cache, *train(tier, tmp_path / "out", **arguments)))
    assert not (tmp_path / "out").exists()


def test_unknown_config_key(cache: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(TIER.replace("steps: 4", "stepz: 4"))
    error = one_line_error(run(cache, *train(bad, tmp_path / "out")))
    assert f"{bad}: experiments.digits.train.stepz is an unknown key (value 4): the keys here are" in error
    assert not (tmp_path / "out").exists()


def test_source_local_without_data(tier: Path, cache: Path, tmp_path: Path) -> None:
    error = one_line_error(run(cache, *train(tier, tmp_path / "out", "--set", "data.source=local"), data=tmp_path))
    assert "data.source = 'local' but cifar10 was not found" in error
    assert str(tmp_path) in error


def test_an_archive_with_a_wrong_checksum(tier: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "cifar10-jpeg.tar.xz").write_bytes(b"something else")
    error = one_line_error(run(cache, *train(tier, tmp_path / "out", "--set", "data.source=auto"), data=tmp_path))
    assert "cifar10-jpeg.tar.xz is damaged or another version: expected sha256 52cd67fe" in error
    assert "got " in error


def test_a_truncated_image(tier: Path, cache: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "cifar10" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32), (200, 10, 99)).save(folder / "0000.jpg")
    victim = tmp_path / "cifar10" / "test" / "dog" / "0000.jpg"
    victim.write_bytes(victim.read_bytes()[:-100])
    error = one_line_error(run(cache, *train(tier, tmp_path / "out", "--set", "data.source=local"), data=tmp_path))
    assert f"{victim} is not a whole image" in error


@pytest.mark.parametrize(("rank", "words"), [("0", "rank = 0 is not legal"), ("33", "33")])
def test_a_rank_of_zero_or_above_the_dimension(tier: Path, cache: Path, tmp_path: Path, rank: str, words: str) -> None:
    error = one_line_error(run(cache, *train(tier, tmp_path / "out", "--set", f"options.plan.rank={rank}", variant="mango")))
    assert "rank" in error
    assert words in error
    if rank == "33":
        assert "blocks.1.conv1.weight" in error


@pytest.fixture
def here(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The same command in this process, where starting another would only cost time."""
    monkeypatch.setenv("MANGO_CACHE", str(cache))
    monkeypatch.setenv("MANGO_DATA", "")

    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as done:
            code = int(done.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("name", "options"), [("adamw", "options.lr=-1"), ("adamw", "options.momentun=1"), ("mango", "options.plan.rnk=1")]
)
def test_an_option_that_the_optimizer_does_not_have(
    tier: Path, tmp_path: Path, here: Callable[..., tuple[int, str, str]], name: str, options: str
) -> None:
    value = options.partition("=")[0].rpartition(".")[2]
    error = one_line_error(here(*train(tier, tmp_path / "out", "--set", options, variant=name)))
    assert value.replace("lr", "learning rate") in error


def test_a_results_file_that_fails_its_schema(tier: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"schema_version": 2}')
    error = one_line_error(run(cache, *train(tier, tmp_path, "--resume")))
    assert f"{tmp_path}/run.json: schema_version = 2 is not legal: 1" in error
    assert (tmp_path / "run.json").read_text() == '{"schema_version": 2}'


@pytest.mark.parametrize("below", ["", "new/folder"])
def test_a_read_only_output_folder(tier: Path, cache: Path, tmp_path: Path, below: str) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)  # refused even for root, who could write here
    try:
        error = one_line_error(run(cache, *train(tier, locked / below)))
        assert f"{locked}: read-only folder" in error
        assert list(locked.iterdir()) == []
    finally:
        locked.chmod(0o755)


def test_a_full_disk_keeps_what_was_there(tier: Path, cache: Path, tmp_path: Path) -> None:
    interrupted = start(cache, *train(tier, tmp_path, "--set", "train.steps=100000", "--set", "train.eval_every=50"))
    wait_for(tmp_path / "checkpoint.pt", interrupted)
    interrupted.send_signal(signal.SIGTERM)
    _, err = interrupted.communicate(timeout=120)
    assert interrupted.returncode == 143
    assert err.startswith("mango: stopped by SIGTERM; continue with --resume")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt.partial").symlink_to("/dev/full")  # where the next checkpoint is written: the disk is full
    error = one_line_error(run(cache, *train(tier, tmp_path, "--set", "train.steps=100000", "--set", "train.eval_every=50", "--resume")))
    assert "checkpoint.pt" in error
    assert "No space left" in error or "disk full" in error
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not (tmp_path / "run.json").exists()
    assert not list(tmp_path.glob("*.partial"))


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    for _ in range(6000):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError(f"{path} did not appear")


def test_a_whole_run_then_nothing_is_overwritten(tier: Path, cache: Path, tmp_path: Path) -> None:
    code, out, err = run(cache, *train(tier, tmp_path / "out", variant="mango"))
    assert code == 0, err
    assert "digits/mango/0 on digits (embedded stand-in): train_loss" in out
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(before) == {"run.json", "metrics.jsonl", "memory.csv", "model.pt"}
    assert json.loads(before["run.json"])["status"] == "completed"
    error = one_line_error(run(cache, *train(tier, tmp_path / "out", variant="mango")))
    assert "it holds run.json, metrics.jsonl, model.pt, memory.csv); --resume continues it, --force starts it over" in error
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


# the other commands


def test_doctor_reports_in_text_and_json(cache: Path) -> None:
    code, out, err = run(cache, "doctor", "--json")
    assert code == 0, err
    findings = {(finding["group"], finding["name"]): finding for finding in json.loads(out)}
    assert all(findings["core", name]["ok"] for name in ("python", "torch", "numpy", "mango"))
    assert findings["data", "cifar10"]["ok"] is False, "the stand-in is not CIFAR-10"
    assert "MANGO_DATA" in findings["data", "cifar10"]["remedy"]
    assert findings["data", "text"]["ok"] is False and "Python's documentation" in findings["data", "text"]["detail"]
    assert "fetch" not in findings["data", "text"]["remedy"], "there is nothing to fetch"
    assert all(finding["ok"] or finding["remedy"] for finding in findings.values())


def test_doctor_names_what_is_missing_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MANGO_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name in ("sympy", "numpy") else object())
    text = doctor.text(doctor.examine())
    assert "MISSING numpy" in text
    assert "pip install '.[theory]'" in text
    assert "apt-get install texlive" in text
    assert text.endswith("The core is not complete: see MISSING above.")


def test_unknown_command_and_missing_argument(here: Callable[..., tuple[int, str, str]]) -> None:
    assert "invalid choice: 'trian'" in one_line_error(here("trian"))
    assert "--variant" in one_line_error(here("train", "digits", "--config", "x", "--out", "y"))


def test_data_list_and_verify(here: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = here("data", "list", "--json")
    assert code == 0
    names = ("c4", "cifar10", "digits", "fineweb-edu", "imagefolder", "movie-reviews", "movie-sentiment", "text")
    assert {row["name"]: row["source"] for row in json.loads(out)["datasets"]} == dict.fromkeys(names, "embedded")
    code, out, err = here("data", "verify", "digits")
    assert (code, err) == (0, "")
    assert out.startswith("digits: digits (embedded stand-in) (embedded), 1442 + 355 images, sha256 ")


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["train", "--help"], ["data", "verify", "--help"]):
        with pytest.raises(SystemExit) as done:
            cli.main(arguments)
        assert done.value.code == 0
    assert "usage: mango data verify" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("mango 0.")


def test_the_command_line_itself_imports_nothing_heavy() -> None:
    code = (
        "import sys, types; package = types.ModuleType('mango'); package.__path__ = [sys.argv[1]]; sys.modules['mango'] = package\n"
        "from mango import cli\ntry: cli.main(['train', '--help'])\nexcept SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'pydantic', 'yaml', 'tqdm')))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code, str(ROOT / "mango")], stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)}
        ).returncode
        == 0
    )


def test_a_table_aligns_its_columns() -> None:
    rows = [{"name": "nf4", "ratio": 0.123456}, {"name": "int8", "ratio": None, "bytes": 5}]
    assert cli.table(rows).splitlines() == ["name  ratio   bytes", "nf4   0.1235", "int8          5"]


def test_the_bar_of_the_steps_shows_how_many_images_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with cli._Bars(True) as bars:
        bars.update("images decoded", 640, 0)
        bars.update("steps", 1, 4)
        bars.update("images/s", 1234, 0)
        bars.bar.refresh()
    assert "images decoded" in terminal.getvalue() and "1,234 images/s" in terminal.getvalue()
