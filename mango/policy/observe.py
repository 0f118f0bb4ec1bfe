"""From an optimizer under way to an Observation: the one place that knows where each feature comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log, log2, prod
from statistics import fmean

import torch

from mango.optim.plan import LayerPlan, matrix_count, matrix_shape
from mango.policy.actions import Actions, Shape
from mango.policy.base import LAYER, Observation, flags

Diagnostics = Mapping[str, Mapping[str, float]]  # see Mango.diagnostics
TINY = 1e-12


def observe(
    actions: Actions,
    layers: Mapping[str, tuple[Shape, LayerPlan, LayerPlan]],  # name -> shape, the layer's own plan, the plan in force
    diagnostics: Diagnostics,
    world: Mapping[str, float | None],  # loss_slope, progress, seconds, watts: what is known of them
    budget: int | None = None,  # bytes that these layers may hold together
) -> Observation:
    """What a policy sees. Stacks of experts are one layer, with the mean of their diagnostics."""
    shapes = [shape for shape, _, _ in layers.values()]
    bases = [base for _, base, _ in layers.values()]
    current = [actions.of(plan) for _, _, plan in layers.values()]
    nbytes = torch.tensor([actions.nbytes(shape, base) for shape, base in zip(shapes, bases, strict=True)])
    allowed = torch.tensor([actions.allowed(shape) for shape in shapes])
    rows = []
    for place, (name, (shape, _, plan)) in enumerate(layers.items()):
        rows.append(_features(place / max(1, len(layers) - 1), shape, plan, actions.table[current[place]], actions, _of(name, diagnostics)))
    values = sum(map(prod, shapes))
    told = dict(world)
    if budget is not None:
        used = sum(int(nbytes[place, action]) for place, action in enumerate(current))
        told |= {"used": used / max(budget, 1), "budget": log(max(budget, 1) / values)}
    return Observation(tuple(layers), tuple(shapes), torch.tensor(rows), flags(told), tuple(bases), tuple(current), nbytes, allowed, budget)


def _of(name: str, diagnostics: Diagnostics) -> dict[str, float]:
    """A layer's diagnostics; the mean over its experts, whose names are name[0], name[1], ..."""
    found = [values for key, values in diagnostics.items() if key == name or key.startswith(f"{name}[")]
    return {key: fmean(values[key] for values in found) for key in found[0]} if found else {}


def _features(
    depth: float, shape: Shape, plan: LayerPlan, action: Sequence[int], actions: Actions, seen: Mapping[str, float]
) -> list[float]:
    rows, cols = matrix_shape(shape)
    row = {
        "rank": log2(plan.columns(rows, cols) / min(rows, cols)),
        "bits": actions.bits[action[1]] / 16,
        "moments": actions.moments[action[2]] / 16,
        "size": log(prod(shape)),
        "aspect": log(max(rows, cols) / min(rows, cols)),
        "depth": depth,
        "convolution": float(len(shape) > 2 and matrix_count(shape) == 1),
        "experts": float(matrix_count(shape) > 1),
    }
    if seen:
        row |= {"observed": 1.0, "log_norm": log(max(seen["norm"], TINY))}
        row |= {key: seen[key] for key in ("variance", "cosine", "energy", "drift")}
        row["error_ratio"] = log(max(seen["error_ratio"], TINY)) if seen["error_ratio"] > 1.0 else seen["error_ratio"] - 1.0
    return [row.get(name, 0.0) for name in LAYER]
