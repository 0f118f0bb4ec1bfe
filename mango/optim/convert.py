"""One parameter's state carried from one plan to another: what the new plan can hold of it, and a cautious guess at the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mango.draws import counter_generator, gaussian
from mango.errors import ConfigError
from mango.optim.layers import LayerStack
from mango.optim.plan import LayerPlan, is_matrix, matrix_count, matrix_shape
from mango.orthonormal import orthonormalize
from mango.stacked import Stacked
from mango.subspace import power_step, rotate_moments, rotation

PLAIN = ("exp_avg", "exp_avg_sq")  # plain AdamW's moments, float32 in the parameter's shape


def check(state: Mapping[str, Any], shape: Sequence[int], plan: LayerPlan | None, device: torch.device, name: str) -> LayerStack | None:
    """The state of one parameter in a stack of its own; None for plain AdamW. Raises: ConfigError when it does not fit the plan."""
    if not isinstance(state.get("step"), int):
        raise ConfigError.of(f"state of {name}, step", state.get("step"), "an integer")
    if plan is None or not is_matrix(shape):
        for key in PLAIN:
            found = state.get(key)
            if not isinstance(found, Tensor) or found.shape != torch.Size(shape):
                raise ConfigError.of(f"state of {name}, {key}", list(state), f"a tensor of shape {tuple(shape)}")
        return None
    stack = LayerStack(plan, matrix_shape(shape), matrix_count(shape), device, name)
    stack.load(0, stack.layers, state, name)
    return stack


def convert(
    state: Mapping[str, Any],
    shape: Sequence[int],
    old: LayerPlan | None,
    new: LayerPlan | None,
    device: torch.device,
    seed: tuple[int, ...],
    name: str,
) -> dict[str, Any]:
    r"""The state under another plan. What the plans store alike is copied bit for bit; equal plans give the state as it is.

    - Basis: a smaller rank keeps the strongest columns (a step sorts them), a larger one adds fresh orthonormal directions. From plain
      AdamW it is found by two power steps on the first moment.
    - Moments: with R the rotation from the old basis to the new one (plain AdamW's is the identity), M' = R M and
      V' = (R ∘ R) V + (1 - \|R_i\|²) V_weakest, where the last term is for the part of a direction of which the old basis knew nothing: its
      first moment is zero, and its second is taken to be that of the weakest direction that was tracked, so that its first steps are too
      short rather than too long. Then both are encoded anew.
    - Error: decoded and encoded anew.
    - Mean squares of the residual: kept; where they are new they start at zero, and the residual's strength now takes their place.

    Dropped: momentum along directions that a smaller rank gives up; the kept error where the new plan keeps none, and in a change to plain
    AdamW, which has no place for it; what a coarser codec rounds away. The count of steps stays, so bias correction and scouts go on.

    Args:
        state: of one parameter, on ``device``; left alone.
        shape: of the parameter.
        old, new: plans; None = plain AdamW.
        seed: counters for the fresh directions and for codecs that draw.
        name: for messages.

    Raises: ConfigError when the state is not one of ``old``, or ``new`` asks for more columns than the matrix has.
    """
    source = check(state, shape, old, device, name)
    if old == new or not is_matrix(shape):
        return dict(state)
    rows, cols = matrix_shape(shape)
    folded = (matrix_count(shape), rows, cols)
    if source is not None:
        before = orthonormalize(source.basis.read())  # (count, m, r)
        first, second = source.moments.first.read(), source.moments.root.read().square_()  # (count, r, n)
    else:
        first, second = (_upright(state[key].reshape(folded)).float() for key in PLAIN)  # (count, m, n)
        before = None
    if new is None:
        assert before is not None  # old and new differ
        moments = (_upright(moment, rows > cols) for moment in _carry(before, first, second))
        return {"step": state["step"], **{key: moment.reshape(shape).contiguous() for key, moment in zip(PLAIN, moments, strict=True)}}
    target = LayerStack(new, (rows, cols), folded[0], device, name)
    basis = _basis(before, first, target.rank, seed)  # (count, m, r')
    turn = basis.mT if before is None else rotation(basis, before)  # (count, r', r)
    first, second = _carry(turn, first, second)
    generator = counter_generator(seed, device)
    stores = [(target.basis, basis), (target.moments.first, first), (target.moments.root, second.sqrt_())]
    kept = [None] * 3 if source is None else [source.basis, source.moments.first, source.moments.root]
    for (store, values), stored in zip(stores, kept, strict=True):
        _store(store, stored, values, generator, name)
    if source is not None:
        kept_before = source.extras()
        for quantity, held in target.extras().items():
            if (stored := kept_before.get(quantity)) is not None:
                _store(held, stored, stored.read(), generator, name)
    return {"step": state["step"], **target.views(0, target.layers)}


def _upright(matrices: Tensor, flip: bool | None = None) -> Tensor:
    """(count, rows, cols) with the smaller dimension first, or what is so turned back."""
    flip = matrices.shape[-2] > matrices.shape[-1] if flip is None else flip
    return matrices.mT if flip else matrices


def _basis(before: Tensor | None, first: Tensor, rank: int, seed: tuple[int, ...]) -> Tensor:
    """(count, m, rank): the old one cut or extended, or the leading directions of the first moment (count, m, n)."""
    count, small = first.shape[0], (first if before is None else before).shape[-2]
    fresh = gaussian((count, small, rank), seed, first.device)
    if before is None:
        basis = orthonormalize(fresh)
        for _ in range(2):
            basis = power_step(basis, first)[0]
        return basis
    missing = rank - before.shape[-1]
    return before[..., :rank] if missing <= 0 else orthonormalize(torch.cat([before, fresh[..., :missing]], dim=-1))


def _carry(turn: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Moments (count, r, n) in a basis to which ``turn`` (count, r', r) leads."""
    unknown = (1.0 - turn.square().sum(dim=-1, keepdim=True)).clamp(0.0, 1.0)  # (count, r', 1)
    m, v = rotate_moments(turn, first, second)
    return m, v + unknown * second[..., -1:, :]


def _store(store: Stacked, before: Stacked | None, values: Tensor, generator: torch.Generator | None, name: str) -> None:
    """Write values, or copy the codes where they are stored as before: encoding what was decoded may round once more."""
    if before is not None and (before.shape, before.codec.name) == (store.shape, store.codec.name):
        for part, codes in store.parts().items():
            codes.copy_(before.parts()[part])
    else:
        store.write(values, generator=generator, name=name)


def moved(value: Any, device: torch.device, name: str) -> Any:
    """A copy on the device. Raises: ConfigError for a tensor without data where data is needed."""
    if not isinstance(value, Tensor):
        return value
    if value.is_meta and device.type != "meta":
        raise ConfigError.of(name, "a tensor on the meta device", "one that holds data")
    return value.to(device, copy=True)
