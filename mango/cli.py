"""The command line. Heavy imports happen inside the commands, so that ``mango --help`` answers at once."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from mango.errors import ConfigError, MangoError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns: the exit code: 0 done, 1 a check failed, 2 bad input (one line on stderr), 130 or 143 after SIGINT or SIGTERM.
    """
    parsed = _parser().parse_args(arguments)
    try:
        return parsed.command(parsed)
    except MangoError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except KeyboardInterrupt:
        print("mango: interrupted", file=sys.stderr)
        return 130


def _fail(message: str) -> int:
    print("mango: error: " + " ".join(message.split()), file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    """argparse with the house's errors: one line, exit code 2."""

    def error(self, message: str) -> Any:
        sys.exit(_fail(f"{message} (see {self.prog} --help)"))


class _Version(argparse.Action):
    def __call__(self, *_: Any, **__: Any) -> None:
        from mango import __version__

        print(f"mango {__version__}")
        sys.exit(0)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mango", description="Train large models in little memory, with certified bounds.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)

    train = commands.add_parser(
        "train",
        help="train one variant of one experiment with one seed",
        description="Train one variant of one experiment with one seed; write run.json, metrics.jsonl, memory.csv, model.pt to a folder.",
        epilog="Example: mango train cifar10 --config workflow/config/smoke.yaml --variant adamw --out /tmp/run --set train.steps=20",
    )
    train.add_argument("experiment", help="a key of the file's experiments")
    train.add_argument("--config", required=True, metavar="FILE", help="a tier's YAML file, workflow/config/<tier>.yaml")
    train.add_argument("--variant", required=True, metavar="NAME", help="a key of the experiment's variants")
    train.add_argument("--seed", type=int, default=0, metavar="N", help="determines initialisation, batches and augmentation (default 0)")
    train.add_argument("--out", required=True, type=Path, metavar="DIR", help="output folder")
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one value, e.g. train.steps=20, options.lr=1e-3, data.source=local",
    )
    train.add_argument("--resume", action="store_true", help="continue from the checkpoint in the output folder, if there is one")
    train.add_argument("--force", action="store_true", help="start over, whatever the output folder holds")
    train.add_argument("--wandb", action="store_true", help="also log to Weights & Biases (offline unless WANDB_MODE says otherwise)")
    train.add_argument(
        "--energy",
        nargs="?",
        const="log",
        default="record",
        choices=["record", "log", "require"],
        help="also write joules into every line of metrics.jsonl; --energy=require fails where nothing measures them",
    )
    train.add_argument("--quiet", action="store_true", help="no progress bar")
    train.set_defaults(command=_train)

    data = commands.add_parser(
        "data", help="list, verify or fetch datasets", description="Datasets: what is here, whether it is whole, how to get it."
    )
    actions = data.add_subparsers(title="actions", metavar="ACTION", required=True, parser_class=_Parser)
    listing = actions.add_parser("list", help="every dataset and where it would be taken from")
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(command=_data_list)
    verify = actions.add_parser("verify", help="check checksums and decode everything")
    verify.add_argument("name", nargs="*", help="datasets (default: all)")
    verify.set_defaults(command=_data_verify)
    fetch = actions.add_parser("fetch", help="download a dataset into the cache (the only command that uses the network)")
    fetch.add_argument("name", help="a dataset")
    fetch.set_defaults(command=_data_fetch)

    doctor = commands.add_parser("doctor", help="what is installed, what is missing and how to get it")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(command=_doctor)

    plan = commands.add_parser(
        "plan",
        help="what fits on a card: memory by category for every method",
        description="Memory by category on a card, for every method; what fits, and how long a sequence could be.",
        epilog="Example: mango plan --model llama-7b --gpu rtx4090 --seq 1024 --batch 1",
    )
    plan.add_argument(
        "--model", required=True, metavar="NAME", help="nanochat-d12, llama-7b, resnet50, vit-b16, or a Hugging Face config.json"
    )
    plan.add_argument("--gpu", default="rtx5090", metavar="NAME", help="rtx3090, rtx4090, rtx5090, a100-40, a100-80, h100 or h200")
    plan.add_argument("--seq", type=int, metavar="N", help="tokens a sequence (default: the model's own)")
    plan.add_argument("--batch", type=int, default=1, metavar="N", help="sequences or images in a forward pass (default 1)")
    plan.add_argument("--method", action="append", metavar="NAME", help="a row of the table; repeatable (default: all but +int4 and +int2)")
    plan.add_argument("--dtype", default="bf16", metavar="NAME", help="of weights and gradients: bf16, fp16 or fp32")
    plan.add_argument("--rank", default="0.125", metavar="R", help="GaLore's and Mango's: an integer or a fraction (default 0.125)")
    plan.add_argument("--reserve", metavar="BYTES", help="memory of the card that is left alone, e.g. 2GiB")
    plan.add_argument("--json", action="store_true", help="print JSON, in bytes")
    plan.add_argument("--figure", type=Path, metavar="FILE", help="also draw it (.pdf, .png or .svg)")
    plan.set_defaults(command=_plan)

    bench = commands.add_parser(
        "bench", help="compare with peers in one process", description="Timings and bytes beside peers', measured in one process."
    )
    bench.add_argument("name", help="which comparison: codecs, optimizers, training (the optimizer's share of a step; minutes), ...")
    bench.add_argument("--model", metavar="NAME", help="of optimizers: matrices (default) or nanochat; of training: gpt-124m (default)")
    bench.add_argument("--repeats", type=int, metavar="N", help="rounds that are timed")
    bench.add_argument("--json", action="store_true", help="print JSON rows")
    bench.set_defaults(command=_bench)
    return parser


def _train(options: argparse.Namespace) -> int:
    from mango.training import config

    tier = config.load(options.config)
    run = config.resolve(tier, options.experiment, options.variant, options.seed, options.set, options.wandb, options.energy)
    from mango.training.loop import train  # torch comes in only after the configuration has been found good
    from mango.training.session import Interrupted

    with _Bars(enabled=not options.quiet) as bars:
        try:
            result = train(run, options.out, resume=options.resume, force=options.force, progress=bars.update)
        except Interrupted as stopped:
            bars.close()
            print(f"mango: {stopped}", file=sys.stderr)
            return 128 + stopped.number
    final = result.metrics.final.model_dump(exclude_none=True, exclude={"step"})
    scores = ", ".join(f"{key} {value:.4f}" for key, value in final.items())
    name, took = f"{run.experiment}/{run.variant}/{run.seed}", f"{result.steps} steps in {result.wall_seconds:.1f} s"
    print(f"{name} on {result.data.title}: {scores}; {took} -> {options.out}")
    return 0


def _data_list(options: argparse.Namespace) -> int:
    from mango import data
    from mango.data.sources import cache_root, data_root

    rows = []
    for name, description in data.NAMES.items():
        source, origin = data.find(name, "auto")
        rows.append(
            {
                "name": name,
                "description": description,
                "source": source,
                "title": origin.title,
                "place": str(getattr(origin, "path", getattr(origin, "root", ""))),
            }
        )
    if options.json:
        print(json.dumps({"data": str(data_root() or ""), "cache": str(cache_root()), "datasets": rows}, indent=2))
    else:
        print(f"data folder: {data_root() or 'none (set MANGO_DATA)'}\ncache: {cache_root()}")
        print(table(rows))
    return 0


def _data_verify(options: argparse.Namespace) -> int:
    from mango import data

    for name in options.name or data.NAMES:
        with _Bars(enabled=True) as bars:
            loaded = data.load(name, progress=bars.decoded)
        found = loaded.identity()
        counts = f"{found['train']} + {found['test']} {loaded.unit}"
        print(f"{name}: {found['title']} ({found['source']}), {counts}, sha256 {found['fingerprint']}")
    return 0


def _data_fetch(options: argparse.Namespace) -> int:
    from mango import data

    _, origin = data.find(options.name, "download")
    print(f"{options.name}: {origin.title} in {getattr(origin, 'root', '')}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from mango import doctor

    findings = doctor.examine()
    print(json.dumps([finding.plain() for finding in findings], indent=2) if options.json else doctor.text(findings))
    return 0 if all(finding.ok for finding in findings if finding.required) else 1


def _plan(options: argparse.Namespace) -> int:
    from mango.planner import figure, gpus, text
    from mango.planner.report import plan

    if options.figure is not None:
        figure.check(options.figure)
    with _Bars(enabled=not options.json) as bars:
        report = plan(
            options.model,
            options.gpu,
            options.seq,
            options.batch,
            options.method,
            options.dtype,
            _rank(options.rank),
            gpus.RESERVE if options.reserve is None else options.reserve,
            bars.named,
        )
    if options.figure is not None:
        figure.draw(report, options.figure)
    print(json.dumps(report.plain(), indent=2) if options.json else text.text(report, table))
    return 0


def _rank(value: str) -> int | float:
    try:
        return int(value) if value.strip().isdigit() else float(value)
    except ValueError:
        raise ConfigError.of("rank", value, "an integer >= 1 or a fraction in (0, 1]") from None


def _bench(options: argparse.Namespace) -> int:
    from mango import bench

    run = bench.REGISTRY.load(options.name)
    known = signature(run).parameters
    given = {key: value for key in ("model", "repeats") if (value := getattr(options, key)) is not None}
    for key in given.keys() - known.keys():
        raise ConfigError.of(f"--{key}", given[key], f"left out: mango bench {options.name} has no such option")
    with _Bars(enabled=not options.json) as bars:
        rows = run(**given, **({"progress": bars.named} if "progress" in known else {}))
    print(json.dumps(rows, indent=2) if options.json else table(rows))
    return 0


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as aligned text columns; numbers with four significant digits."""
    if not rows:
        return "(nothing)"
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    grid = [columns] + [[cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[index]) for line in grid) for index in range(len(columns))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in grid)


class _Bars:
    """One progress bar per kind of work, on stderr, only where someone watches."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled and sys.stderr.isatty()
        self.kind = ""
        self.bar: Any = None

    def update(self, kind: str, done: int, total: int) -> None:
        if not self.enabled:
            return
        if kind.endswith("/s"):
            self.bar.set_postfix_str(f"{done:,} {kind}", refresh=False)
            return
        if kind != self.kind:
            from mango.compat import require

            self.close()
            tqdm: Callable[..., Any] = require("tqdm", extra="experiments", purpose="progress bars").tqdm
            self.kind, self.bar = kind, tqdm(total=total or None, desc=kind, unit="", dynamic_ncols=True, leave=False)
        self.bar.update(done - self.bar.n)

    def named(self, what: str) -> None:
        self.update(what, 0, 0)

    def decoded(self, images: int) -> None:
        self.update("images decoded", images, 0)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.kind, self.bar = "", None

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


if __name__ == "__main__":
    sys.exit(main())
