"""MoleGrad in the training loop: what is converted, what it tells on the way, and what a checkpoint keeps of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from mango.mole import MoleConfig, convert, state


class MoleRun:
    """A model whose layers are converted for one run.

    Args:
        model: converted in place.
        fields: of ``mango.mole.MoleConfig``.
        write: takes one row of diagnostics, every ``diagnostics_every`` steps for each layer.

    Raises: ConfigError as these do.
    """

    def __init__(self, model: nn.Module, fields: Mapping[str, Any], write: Callable[[dict[str, object]], None]) -> None:
        self.model, self.config = model, MoleConfig.of(fields)
        self.report = convert(model, self.config)
        self.report.observe(write)

    def state_dict(self) -> dict[str, Any]:
        """What layers carry from step to step; the model's own state knows nothing of the conversion."""
        return state.state_dict(self.model)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take it up again, also where rank or store have changed."""
        state.load_state_dict(self.model, saved)

    def record(self) -> dict[str, Any]:
        """For the run record: see ``mango.training.record.Mole``."""
        return {"converted": self.report.converted, "skipped": self.report.skipped}
