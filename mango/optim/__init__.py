"""Optimizers under one interface: Mango and the peers that it is compared with.

``optimizer = mango.optim.build("galore", model, lr=1e-3, rank=0.125, exclude=["embedding"])``
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mango.optim.accounting import state_nbytes
from mango.optim.baselines import checked
from mango.optim.chain import Chain, Part
from mango.optim.mango import Mango
from mango.optim.plan import LayerPlan
from mango.optim.split import matching, split
from mango.registry import Registry

NAMES = ("adamw", "sgd", "adafactor", "muon", "adamw8bit", "pagedadamw8bit", "galore", "galore8bit", "adarankgrad", "mango", "mole")
REGISTRY = Registry("optimizer", {name: f"mango.optim.baselines:{name}" for name in NAMES})


def build(
    name: str, model_or_named: nn.Module | Iterable[tuple[str, Tensor]], *, exclude: Sequence[str] = (), **options: Any
) -> torch.optim.Optimizer:
    """An optimizer of the registry over a model's trainable parameters.

    Args:
        name: of the registry.
        model_or_named: a module, or (name, parameter) pairs.
        exclude: regular expressions; parameters whose names match are not "matrices under test" (see ``split``).
        options: ``lr`` for the matrices, ``rest_lr`` for the rest (default: ``lr``; for Muon a rate for AdamW), ``weight_decay``,
            and the method's own.

    Raises:
        ConfigError: for an unknown name, option or value. MissingExtra: when the method's package is absent.
    """
    return checked(REGISTRY.load(name), name, *split(model_or_named, exclude), options)


__all__ = ["REGISTRY", "Chain", "LayerPlan", "Mango", "Part", "build", "matching", "split", "state_nbytes"]
