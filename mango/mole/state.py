"""What converted layers carry from step to step, as tensors and plain numbers for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mango.draws import gaussian
from mango.errors import ConfigError
from mango.mole.layer import Layer
from mango.orthonormal import orthonormalize

State = dict[str, dict[str, Any]]


def layers(model: nn.Module) -> list[Layer]:
    """The converted matrices of a model, each once, in the order of their numbers."""
    found: dict[int, Layer] = {}
    for module in model.modules():
        held = getattr(module, "mole", None)
        for layer in held if isinstance(held, list) else [held] if isinstance(held, Layer) else []:
            found[layer.number] = layer
    return [found[number] for number in sorted(found)]


def state_dict(model: nn.Module) -> State:
    """Of each converted layer by name: its step count and its basis. The model's own state_dict knows nothing of the conversion."""
    state: State = {}
    for layer in layers(model):
        own: dict[str, Any] = {"steps": layer.steps}
        if layer.sketch is not None and layer.sketch.basis is not None:
            own |= {"kind": "sketch", "basis": layer.sketch.basis, "seen": layer.sketch.seen}
        if layer.tracked is not None and layer.tracked.basis is not None:
            own |= {"kind": "tracked", "basis": layer.tracked.basis, "energy": layer.tracked.energy, "carried": layer.tracked.carried}
        state[layer.name] = own
    return state


def load_state_dict(model: nn.Module, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Take up a saved state, also one of another rank, store or gradient.

    A basis of a higher rank keeps its strongest columns; one of a lower rank gets Gaussian columns of its complement. What another
    store or gradient tracked is of no use and is left; layers that the state does not know start anew.

    Raises: ConfigError for a basis whose number of rows is not the layer's.
    """
    for layer in layers(model):
        own = state.get(layer.name)
        if own is None:
            continue
        layer.steps = int(own["steps"])
        kind = own.get("kind")
        if kind == "sketch" and layer.sketch is not None:
            sketch = layer.sketch
            sketch.basis = _fitted(layer, own["basis"], sketch.inputs, sketch.rank)
            seen = own["seen"]
            sketch.seen = None if seen is None else _square(seen, sketch.rank)
        elif kind == "tracked" and layer.tracked is not None:
            tracked = layer.tracked
            same = own["basis"].shape[1] == tracked.total
            tracked.basis = _fitted(layer, own["basis"], tracked.small, tracked.total)
            tracked.energy = _square(torch.diag(own["energy"]), tracked.total).diagonal().clone()
            carries = same and layer.config.residual == "carried" and own["carried"] is not None
            tracked.carried = tuple(part.clone() for part in own["carried"]) if carries else None


def _fitted(layer: Layer, basis: Tensor, rows: int, rank: int) -> Tensor:
    if basis.shape[0] != rows:
        raise ConfigError.of(f"state of {layer.name}, basis", tuple(basis.shape), f"a tensor of {rows} rows")
    missing = rank - basis.shape[1]
    if missing <= 0:
        return basis[:, :rank].clone()
    fresh = gaussian((rows, missing), (layer.config.seed, layer.number, layer.steps, 5), basis.device)
    return orthonormalize(torch.cat([basis, fresh], dim=1))


def _square(matrix: Tensor, size: int) -> Tensor:
    """The leading block of a matrix, filled up with zeros."""
    fitted = matrix.new_zeros(size, size)
    least = min(size, len(matrix))
    fitted[:least, :least] = matrix[:least, :least]
    return fitted
