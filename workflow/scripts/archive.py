"""Run variants of an experiment inside a time limit and keep the records: what is meant for an hour on someone's accelerator.

python workflow/scripts/archive.py cifar10 --minutes 50 --out results/archive/rtx5090-2026-12
python workflow/scripts/archive.py imagenet-cnn --config workflow/config/smoke.yaml --minutes 1 --out /tmp/a --variants adamw mango

The data travel as the archives of the data folder ($MANGO_DATA) and are decoded here. All variants of the first seed come before those
of the second. A run that the limit cuts off leaves its checkpoint, from which the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from mango.cli import table
from mango.errors import ConfigError, MangoError
from mango.training import atomic, record
from mango.training.config import load, resolve
from mango.training.loop import train
from mango.training.session import RECORD, Interrupted


def clocks() -> str:
    """The accelerator as its driver describes it, at the start of the runs; empty on a CPU."""
    if not torch.cuda.is_available():
        return ""
    fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    return subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv"], capture_output=True, text=True, check=True).stdout


def rows(out: Path, experiment: str, runs: list[tuple[str, int]]) -> list[dict[str, object]]:
    """One line for each run; a run without a record says so."""
    lines = []
    for variant, seed in runs:
        path = out / experiment / variant / str(seed) / RECORD
        if not path.is_file():
            lines.append({"variant": variant, "seed": seed, "test loss": "not run"})
            continue
        found = record.load(path)
        lines.append(
            {
                "variant": variant,
                "seed": seed,
                "test loss": found.metrics.final.test_loss,
                "accuracy": found.metrics.final.test_accuracy,
                "top-5": found.metrics.final.test_top5,
                "bits/byte": found.metrics.final.test_bits_per_byte,
                "state B/param": found.memory.optimizer_state / found.parameters.total,
                found.throughput.unit: found.throughput.value,
                "peak GB": (found.memory.device_peak_allocated or found.memory.rss_peak) / 1e9,
                "seconds": found.wall_seconds,
            }
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment")
    parser.add_argument("--config", default="workflow/config/gpu.yaml")
    parser.add_argument("--minutes", type=float, required=True, help="after which the run under way is stopped at a checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="results/archive/<gpu>-<yyyy-mm>")
    parser.add_argument("--variants", nargs="+", help="in this order (default: all)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of mango train")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes

    def stop(kind: str, done: int, total: int) -> None:
        if kind == "steps" and time.monotonic() >= end:
            os.kill(os.getpid(), signal.SIGTERM)  # the loop writes a checkpoint after a whole step

    try:
        tier = load(options.config)
        if options.experiment not in tier.experiments:
            raise ConfigError.of("experiment", options.experiment, "one of " + ", ".join(tier.experiments))
        chosen = tier.experiments[options.experiment]
        variants = options.variants or list(chosen.variants)
        for variant in variants:
            resolve(tier, options.experiment, variant, 0, options.set)  # names what is wrong before anything runs
        runs = sorted(((variant, seed) for variant in variants for seed in chosen.seeds_of(variant)), key=lambda run: run[1])
        options.out.mkdir(parents=True, exist_ok=True)
        if found := clocks():
            atomic.write(options.out / f"{options.experiment}-device.csv", lambda file: file.write(found.encode()))
        for variant, seed in runs:
            if time.monotonic() >= end:
                break
            run = resolve(tier, options.experiment, variant, seed, options.set)
            try:
                train(run, options.out / options.experiment / variant / str(seed), resume=True, progress=stop)
            except Interrupted:
                break
    except MangoError as error:
        print(f"archive: {error}", file=sys.stderr)
        return 2
    print(table(rows(options.out, options.experiment, runs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
