"""Weights & Biases as a second sink, offline unless ``WANDB_MODE`` says otherwise."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mango.compat import require


@contextmanager
def session(folder: Path, name: str, group: str, config: dict[str, Any]) -> Iterator[Any]:
    """A wandb run whose files lie in ``folder``; it has ``log(values, step=...)``. Raises: MissingExtra when wandb is not installed."""
    wandb = require("wandb", extra="experiments", purpose="--wandb")
    settings = wandb.Settings(silent=True, console="off")
    run = wandb.init(
        project="mango",
        dir=str(folder),
        name=name,
        group=group,
        config=config,
        mode=os.environ.get("WANDB_MODE", "offline"),
        settings=settings,
    )
    failed = True
    try:
        yield run
        failed = False
    finally:
        run.finish(exit_code=int(failed))
