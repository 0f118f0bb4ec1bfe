"""The dials of MoleGrad. Nothing is tuned behind the user's back: every choice is a field, and every field is checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from mango.errors import ConfigError
from mango.fields import build

STORES = ("dense", "bf16", "int8", "nf4", "int4", "int2", "sketch")
GRADIENTS = ("formed", "factored")
TARGETS = ("ffn", "attention", "all")
HIDDEN = ("codes", "recompute")
SKETCHES = ("scouts", "random")
RESIDUALS = ("none", "carried", "unbiased")
HEALTH = ("off", "repair", "stop")
MATMUL = ("auto", "fp8")

Predicate = Callable[[str, nn.Module], bool]


@dataclass(frozen=True, kw_only=True)
class MoleConfig:
    """How converted layers store their inputs and make the gradients of their weights.

    Attributes:
        store: how the input of a layer is kept for the backward pass: "dense" (as it is), "bf16", "int8", "nf4" (nearest rounding), "int4",
            "int2" (stochastic rounding, which leaves gradients unbiased), or "sketch" (only its product with a basis of ``rank`` columns).
        block: values that share a scale in the codes; a power of two from 8 to 65536.
        gradient: "formed", the whole matrix, one layer at a time, for any optimizer; "factored", top-k factors by power steps on inputs and
            output gradients, never formed, for MoleOptimizer (or see ``fill_grad``).
        targets: "ffn", "attention", "all" (every linear layer), a regular expression for names, or a predicate (name, module) -> bool.
        exclude: regular expressions; layers in whose names one is found are left alone.
        min_features: layers with fewer inputs are left alone: their inputs are small.
        norms: also convert parameter-free RMS norms next to converted layers, so that they keep their output once instead of a copy of
            their input in float32; layers that read such an output read it exactly, whatever ``store`` is, and keep nothing of their
            own (but under autocast, and with a sketch).
        hidden: what a converted MLP keeps of its hidden layer: "codes" of its activation and of the activation's derivatives, in which
            gradients are linear, so that unbiased codes leave them unbiased (one code of four bits for both with relu² and int4 or
            int2, see mango.mole.pair); or "recompute": nothing, it is computed again from the code
            of the input. Then memory does not grow with the hidden layer, but rounding passes through the activation.
        derivative_store: the store of the activation's derivatives; None = ``store``.
        chunk: tokens that are worked on at a time in a converted MLP and in encoding; None = all.
        matmul: of the forward product and of that with the input's gradient while training: "auto", in the dtype of the input or of
            autocast, exact; or "fp8", in eight-bit floats with a scale for each tensor (see mango.mole.products), on cards that have
            units for them (compute capability 8.9 and later), for weights both of whose dimensions are multiples of 16. Then output
            and input's gradient are rounded too; the weight's gradient is still formed from the codes.
        rank: columns of the basis for "sketch" and "factored": an integer, or a fraction in (0, 1] of the smaller dimension.
        power_iters: power steps a training step.
        scouts: columns that start each step as fresh Gaussian directions (T3).
        warm_start_decay: weight of what was tracked before beside the present gradient, in [0, 1): the power step is taken on
            (1 - d) G Gᵀ + d P diag(energy) Pᵀ. 0 follows the present gradient alone, which leaves the least for an unbiased rest.
        orthogonalization: "cholesky" (with its fallback to QR, see mango.subspace) or "qr" always.
        sketch_basis: how the basis of "sketch" moves: "scouts", it follows the singular directions of its own gradients; or "random", a
            fresh one every step (CompAct, arXiv:2410.15352).
        residual: what "factored" does with the part of the gradient beyond the top ``rank``: "none", truncates it; "carried", keeps its
            leading ``residual_rank`` directions as factors and adds them to the next gradient; "unbiased", adds what lies along
            ``residual_rank`` random directions beside the basis, scaled so that its expectation is that part.
        residual_rank: as rank.
        energy_target: None, or the share of the gradient's energy in (0, 1) for which directions are kept: the rank used adapts to
            the captured energy, up to ``rank``.
        fill_grad: "factored" also fills ``weight.grad`` with the product of the factors, for any optimizer.
        trust_scaling: scale factored gradients to the norm of the whole gradient, as Hutchinson's estimator sees it.
        probes: of that estimator, at least 2.
        diagnostics_every: steps between diagnostics; 0 = never.
        shadow_every: steps between comparisons with the true gradient; 0 = never.
        shadow: a regular expression for the layers that are compared.
        health: what a fault found in the subspace or the gradient does: "off", "repair" (seed the basis anew), or "stop" (raise).
        min_energy: captured share below which the basis counts as lost.
        seed: of scouts, probes and bases.

    Raises: ConfigError.
    """

    store: str = "int4"
    block: int = 64
    gradient: str = "formed"
    targets: str | Predicate = "ffn"
    exclude: tuple[str, ...] = ()
    min_features: int = 64
    norms: bool = True
    hidden: str = "codes"
    derivative_store: str | None = None
    chunk: int | None = None
    matmul: str = "auto"
    rank: int | float = 32
    power_iters: int = 1
    scouts: int = 1
    warm_start_decay: float = 0.95
    orthogonalization: str = "cholesky"
    sketch_basis: str = "scouts"
    residual: str = "none"
    residual_rank: int | float = 8
    energy_target: float | None = None
    fill_grad: bool = False
    trust_scaling: bool = False
    probes: int = 8
    diagnostics_every: int = 0
    shadow_every: int = 0
    shadow: str = ""
    health: str = "stop"
    min_energy: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", tuple(self.exclude))  # a list, as configuration files have it
        for name, legal in _CHOICES.items():
            if getattr(self, name) not in legal:
                raise ConfigError.of(f"mole.{name}", getattr(self, name), "one of " + ", ".join(legal))
        if self.derivative_store is not None and self.derivative_store not in STORES[:-1]:
            raise ConfigError.of("mole.derivative_store", self.derivative_store, "null or one of " + ", ".join(STORES[:-1]))
        for name, least in _COUNTS.items():
            _count(name, getattr(self, name), least)
        if not 8 <= self.block <= 65536 or self.block & (self.block - 1):
            raise ConfigError.of("mole.block", self.block, "a power of two from 8 to 65536")
        if self.chunk is not None:
            _count("chunk", self.chunk, 1)
        for name in ("rank", "residual_rank"):
            _rank(name, getattr(self, name))
        for name in ("norms", "fill_grad", "trust_scaling"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError.of(f"mole.{name}", getattr(self, name), "true or false")
        for name in ("warm_start_decay", "min_energy"):
            if not isinstance(getattr(self, name), int | float) or not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError.of(f"mole.{name}", getattr(self, name), "a number in [0, 1)")
        if self.energy_target is not None and not 0.0 < self.energy_target < 1.0:
            raise ConfigError.of("mole.energy_target", self.energy_target, "null or a number in (0, 1)")
        patterns = {"exclude": self.exclude, "shadow": (self.shadow,)}
        if isinstance(self.targets, str) and self.targets not in TARGETS:
            patterns["targets"] = (self.targets,)
        elif not isinstance(self.targets, str) and not callable(self.targets):
            raise ConfigError.of("mole.targets", self.targets, "ffn, attention, all, a regular expression or a predicate")
        for name, values in patterns.items():
            for value in values:
                try:
                    re.compile(value)
                except (re.error, TypeError) as error:
                    raise ConfigError.of(f"mole.{name}", value, f"a regular expression ({error})") from None

    @classmethod
    def of(cls, value: MoleConfig | Mapping[str, Any]) -> MoleConfig:
        """A configuration from itself or from plain values, as a file has them."""
        return build(cls, value, "mole", "a MoleConfig or a mapping of its fields")

    def plain(self) -> dict[str, Any]:
        """The fields as plain values; a predicate by its name."""
        targets = self.targets if isinstance(self.targets, str) else getattr(self.targets, "__qualname__", repr(self.targets))
        return {**asdict(self), "targets": targets, "exclude": list(self.exclude)}

    def columns(self, dim: int) -> int:
        """The rank for a matrix whose smaller dimension is ``dim``; an integer rank above it means all of it."""
        return columns(self.rank, dim)


_CHOICES = {
    "store": STORES,
    "gradient": GRADIENTS,
    "hidden": HIDDEN,
    "orthogonalization": ("cholesky", "qr"),
    "sketch_basis": SKETCHES,
    "residual": RESIDUALS,
    "health": HEALTH,
    "matmul": MATMUL,
}
_COUNTS = {"min_features": 1, "power_iters": 1, "scouts": 0, "probes": 2, "diagnostics_every": 0, "shadow_every": 0, "seed": 0}


def columns(rank: int | float, dim: int) -> int:
    """An integer rank, or a fraction of ``dim``, as a number of columns from 1 to ``dim``."""
    return min(rank, dim) if isinstance(rank, int) else max(1, int(rank * dim))


def _count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError.of(f"mole.{name}", value, f"an integer >= {least}")


def _rank(name: str, value: Any) -> None:
    legal = isinstance(value, int | float) and not isinstance(value, bool)
    if not legal or (isinstance(value, int) and value < 1) or (isinstance(value, float) and not 0.0 < value <= 1.0):
        raise ConfigError.of(f"mole.{name}", value, "an integer >= 1 or a fraction in (0, 1]")
