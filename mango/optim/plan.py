"""How one layer's optimizer state is compressed: a validated, frozen description."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from mango import codecs
from mango.errors import ConfigError
from mango.feedback.buffer import KINDS
from mango.fields import build

SMALLEST = 4096  # values; smaller tensors keep plain AdamW, as in torchao's low-bit optimizers and bitsandbytes
POWERS = ("auto", "full", "sampled", "half")
PARTS = 4  # of a gradient along its larger side, of which a sample is one; a quarter did as well as a half
SPARE = 2  # columns of a sample for each of the basis: fewer than that do not show its weak directions
LARGE = 1 << 18  # values of a matrix from which its products cost more than all the rest, and a sample does better than the whole
ELONGATED = 16  # ratio of the sides that embeddings, heads and depthwise convolutions have; MLPs have up to 8, other convolutions mostly 9
SCALINGS = ("factored", "column")
EXPERT = 32  # least side of an expert's matrix; the last side of a one-dimensional convolution is its window


ADAPTER = re.compile(r"(^|\.)lora_")  # peft's names of low-rank factors


def is_adapter(name: str) -> bool:
    """Whether a parameter is a factor of LoRA: of low rank already and a small part of the bytes, so Mango never compresses its state."""
    return ADAPTER.search(name) is not None


def is_matrix(shape: Sequence[int]) -> bool:
    """Whether Mango compresses the state of a parameter of this shape; others keep plain AdamW whatever the plan."""
    return len(shape) >= 2 and prod(shape) >= SMALLEST


def is_head(shape: Sequence[int]) -> bool:
    """Whether a matrix is a linear map from many inputs to few outputs, as heads of classifiers and routers of experts are.

    No normalisation follows them that would make up for long steps. Mango's are several times as long as AdamW's at one learning rate, and
    a head that is stepped so follows the noise of its batches: the default plan leaves it to AdamW, whose state is small there.
    """
    return len(shape) >= 2 and prod(shape[2:]) == 1 and shape[1] >= ELONGATED * shape[0]


def matrix_count(shape: Sequence[int]) -> int:
    """How many matrices a parameter holds: shape[0] for a stack of experts (three dimensions, of which the last two are at least 32)."""
    return shape[0] if len(shape) == 3 and min(shape[1:]) >= EXPERT else 1


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Of each of its matrices: (shape[1], shape[2]) in a stack of experts, else (shape[0], product of the rest), as convolutions fold."""
    return (shape[1], shape[2]) if matrix_count(shape) > 1 else (shape[0], prod(shape[1:]))


@dataclass(frozen=True)
class LayerPlan:
    """The dials of one layer.

    Attributes:
        rank: columns of the basis: an integer, or a fraction in (0, 1] of the smaller matrix dimension (rounded down, at least 1).
        scouts: directions of the start that are fresh Gaussian ones before each step (T3); fewer when the rank is smaller.
        power: how the basis moves: "full", one power step from the basis before; "sampled", one that sees a quarter of the gradient along
            its larger side, drawn anew before each step, and takes the rest to leave the basis where it is ("full" where that quarter
            has less than two columns for each direction of the basis); or "half", half a step from the momentum. "auto" is "half" for
            matrices whose sides are as 16 to 1 or more, such as embeddings: a gradient of which a few rows are not zero would turn the
            whole basis to the words of its batch, and mix the moments of all others. Else it is "sampled" from 2^18 values on, where it
            costs a quarter and wide models do better by it, and "full" below, where small ones do worse.
        basis_codec: how the basis is kept between steps. It is orthonormalised again before it is used (T4).
        factor_codec: quantise the factor U = PᵀH too (LRQ, T4); None leaves it exact.
        moment_codec: how the moments of U are kept: the first as it is, the second as its square root.
        error: "codec", "gradient" or "none": where the part of H that the basis missed is kept (see mango.feedback.buffer).
        error_codec: the codec for ``error="codec"``.
        error_decay: in (0, 1], what the kept error is multiplied by before it is added to the next gradient. 1 is error feedback as its
            theory has it, and forgets nothing: what it remembers is stale where gradients are noisy, as a residual network's on small
            batches. 0.95 remembers about twenty gradients, twice as many as Adam's first moment; language models do worse with 0.9.
        residual: also step along the part of H that the basis missed.
        scaling: how that part is scaled: "factored", divided by the roots of the mean squares of its rows and columns (Adafactor), or
            "column", by the adaptive part's length in each column (Fira), which needs no state. Without error the scales of the smaller
            side are those of the gradient, and scale the captured part too: then what the basis missed need not be formed.
        caution: c in [0, 1]: coordinates of the step whose sign is that of this step's gradient are multiplied by 1 + c, the others, zero
            gradients included, by 1 - c. Momentum and kept error are up to twenty gradients old, and where they have become wrong this
            is seen at once. 1 takes no coordinate against its gradient, as Cautious Optimizers do (arXiv:2411.16085; they then rescale
            by the share of what is left, which a sum over the whole matrix has to wait for, and we do not); 0 is without.
    """

    rank: int | float = 1 / 8
    scouts: int = 1
    power: str = "auto"
    basis_codec: str = "bf16"
    factor_codec: str | None = None
    moment_codec: str = "int8"
    error: str = "codec"
    error_codec: str = "nf4"
    error_decay: float = 0.95
    residual: bool = True
    scaling: str = "factored"
    caution: float = 0.6

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int | float):
            raise ConfigError.of("plan.rank", self.rank, "an integer >= 1 or a fraction in (0, 1]")
        if (isinstance(self.rank, int) and self.rank < 1) or (isinstance(self.rank, float) and not 0.0 < self.rank <= 1.0):
            raise ConfigError.of("plan.rank", self.rank, "an integer >= 1 or a fraction in (0, 1]")
        if isinstance(self.scouts, bool) or not isinstance(self.scouts, int) or self.scouts < 0:
            raise ConfigError.of("plan.scouts", self.scouts, "an integer >= 0")
        if self.power not in POWERS:
            raise ConfigError.of("plan.power", self.power, "one of " + ", ".join(POWERS))
        for name in ("basis_codec", "factor_codec", "moment_codec", "error_codec"):
            value = getattr(self, name)
            if value not in codecs.REGISTRY and not (value is None and name == "factor_codec"):
                raise ConfigError.of(f"plan.{name}", value, "one of " + ", ".join(sorted(codecs.REGISTRY)))
        if self.error not in KINDS:
            raise ConfigError.of("plan.error", self.error, "one of " + ", ".join(KINDS))
        if isinstance(self.error_decay, bool) or not isinstance(self.error_decay, int | float) or not 0.0 < self.error_decay <= 1.0:
            raise ConfigError.of("plan.error_decay", self.error_decay, "a number in (0, 1]; for no error, error = none")
        if isinstance(self.caution, bool) or not isinstance(self.caution, int | float) or not 0.0 <= self.caution <= 1.0:
            raise ConfigError.of("plan.caution", self.caution, "a number in [0, 1]; 0 for none")
        if not isinstance(self.residual, bool):
            raise ConfigError.of("plan.residual", self.residual, "true or false")
        if self.scaling not in SCALINGS:
            raise ConfigError.of("plan.scaling", self.scaling, "one of " + ", ".join(SCALINGS))

    @classmethod
    def of(cls, value: LayerPlan | Mapping[str, Any]) -> LayerPlan:
        """A plan from a plan or from plain values, as a configuration file has them."""
        return build(cls, value, "plan", "a LayerPlan, a mapping of its fields, or None for plain AdamW")

    def plain(self) -> dict[str, Any]:
        """The fields as plain values, for ``state_dict``."""
        return asdict(self)

    def moves(self, rows: int, cols: int) -> str:
        """How the basis of a matrix of this shape moves: ``power`` as it comes out, "full", "sampled" or "half"."""
        small, large = sorted((rows, cols))
        power = self.power
        if power == "auto":
            power = "half" if large >= ELONGATED * small else "sampled" if rows * cols >= LARGE else "full"
        return "full" if power == "sampled" and large < PARTS * SPARE * self.columns(rows, cols) else power

    def columns(self, rows: int, cols: int, name: str = "parameter") -> int:
        """The rank for a matrix of this shape. Raises ConfigError when an integer rank is above the smaller dimension."""
        small = min(rows, cols)
        if isinstance(self.rank, float):
            return max(1, int(self.rank * small))
        if self.rank > small:
            raise ConfigError.of("plan.rank", self.rank, f"at most {small}, the smaller dimension of {name} folded to {rows} x {cols}")
        return self.rank


def applied(plan: LayerPlan | None, name: str, shape: Sequence[int]) -> LayerPlan | None:
    """What a plan that is asked for many parameters makes of one of this name and shape; None = plain AdamW. Heads are compressed where a
    plan is given, and by the default one are not."""
    return None if not is_matrix(shape) or is_adapter(name) or (plan == LayerPlan() and is_head(shape)) else plan
