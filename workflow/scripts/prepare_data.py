"""Decode an experiment's data set into the cache, and write down what was found: name, title, source, fingerprint, sizes.

python workflow/scripts/prepare_data.py cifar10 --config workflow/config/laptop.yaml --out results/laptop/data/cifar10.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mango.data import load
from mango.errors import MangoError
from mango.training.config import load as load_tier


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment")
    parser.add_argument("--config", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    try:
        task = load_tier(options.config).experiments[options.experiment]
        found = load(**task.data_arguments()).identity()
    except MangoError as error:
        print(f"data: {error}", file=sys.stderr)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
