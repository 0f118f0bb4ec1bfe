"""Run a variant's grid on a validation split and write every value and the chosen one.

python workflow/scripts/tune.py cifar10 --config workflow/config/laptop.yaml --variant mango --out results/laptop/tuning/cifar10/mango.json
python workflow/scripts/tune.py --gather results/laptop/tuning/*/*.json --out results/laptop/tuning/all.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from mango.errors import MangoError, NonFinite
from mango.training.config import load, resolve
from mango.training.loop import train

SEED = 1000  # not one of the seeds that are reported


def tune(experiment: str, config: str, variant: str, out: Path) -> dict[str, Any]:
    """Train once for each point of the grid; the lowest final validation loss is chosen. Points that diverge count as infinitely bad."""
    tier = load(config)
    chosen = tier.experiments[experiment]
    grid = chosen.variants[variant].grid
    held_out = chosen.data.validation or (chosen.data.train or 10 * chosen.train.batch) // 5
    points = []
    for values in itertools.product(*grid.values()):
        options = dict(zip(grid, values, strict=True))
        settings = [f"options.{key}={json.dumps(value)}" for key, value in options.items()]
        run = resolve(tier, experiment, variant, SEED, [*settings, f"data.validation={held_out}", "data.evaluate=validation"])
        folder = out.with_suffix("") / "-".join(f"{key}={value}" for key, value in options.items())
        try:
            points.append({"options": options, "loss": train(run, folder, resume=True).metrics.final.validation_loss})
        except NonFinite as error:
            points.append({"options": options, "loss": None, "reason": str(error)})
    finite = [point for point in points if point["loss"] is not None]
    best = min(finite, key=lambda point: point["loss"])["options"] if finite else None
    return {
        "experiment": experiment,
        "variant": variant,
        "tier": tier.tier,
        "seed": SEED,
        "validation": held_out,
        "points": points,
        "chosen": best,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", nargs="?")
    parser.add_argument("--config")
    parser.add_argument("--variant")
    parser.add_argument("--gather", nargs="*", type=Path, default=[])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    try:
        if options.experiment:
            result: Any = tune(options.experiment, options.config, options.variant, options.out)
        else:
            result = [json.loads(path.read_text()) for path in options.gather]
    except MangoError as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
