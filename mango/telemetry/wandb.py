"""Weights & Biases as a second sink, offline unless ``WANDB_MODE`` says otherwise."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mango.compat import require

SUMMARY = {"steps", "wall_seconds", "throughput", "metrics", "memory", "parameters", "energy"}  # fields of the record


@contextmanager
def session(folder: Path, name: str, group: str, config: dict[str, Any]) -> Iterator[Any]:
    """A wandb run whose files lie in ``folder`` and whose axis is the training step.

    Raises: MissingExtra when wandb is not installed.
    """
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
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    failed = True
    try:
        yield run
        failed = False
    finally:
        run.finish(exit_code=int(failed))


def log(run: Any, step: int, prefix: str, values: Mapping[str, Any]) -> None:
    """``values`` as "prefix/key" at a training step; those that are None are left out."""
    run.log({"step": step} | {f"{prefix}/{key}": value for key, value in values.items() if value is not None}, step=step)


def summarise(run: Any, content: Mapping[str, Any]) -> None:
    """Nested values into the run's summary, as "outer.inner"."""
    run.summary.update(dict(_flat("", content)))


def _flat(prefix: str, content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", value
