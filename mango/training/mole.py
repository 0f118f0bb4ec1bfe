"""MoleGrad in the training loop: what is converted, and what that leaves in the record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mango.mole import MoleConfig, convert


class MoleRun:
    """A model whose layers are converted for one run.

    Args:
        model: converted in place.
        fields: of ``mango.mole.MoleConfig``.

    Raises: ConfigError as these do.
    """

    def __init__(self, model: nn.Module, fields: Mapping[str, Any]) -> None:
        self.config = MoleConfig.of(fields)
        self.report = convert(model, self.config)

    def record(self) -> dict[str, Any]:
        """For the run record: see ``mango.training.record.Mole``."""
        return {"converted": self.report.converted, "skipped": self.report.skipped}
