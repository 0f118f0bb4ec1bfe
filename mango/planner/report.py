"""Memory by category for a model, a method, a sequence, a batch and a card: what fits, and how much longer it could be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch

from mango.errors import ConfigError
from mango.mole.config import MoleConfig
from mango.mole.convert import convert, revert
from mango.optim.accounting import layer_nbytes
from mango.optim.plan import LayerPlan, applied
from mango.planner import gpus
from mango.planner.growth import Growth
from mango.planner.methods import METHODS, Method, method, scratch_nbytes, state_nbytes
from mango.planner.targets import Target, target
from mango.planner.trace import Trace, trace
from mango.policy.budget import LADDER, parse_budget, plans_for

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
UNITS = {"sequence": 64, "batch": 2}


@dataclass(frozen=True)
class Row:
    """One method; bytes, each category at its own maximum.

    Attributes:
        gradients: of all parameters, or of the largest one where the optimizer steps in the backward pass.
        state: what the optimizer keeps between steps.
        activations: what autograd keeps for the backward pass.
        workspace: the most that is alive besides at one time, in the passes or in the step.
        peak: the most that is alive at one time: at most the sum of the categories, as they do not culminate together.
        fits: whether ``peak`` is within the card's usable bytes.
        longest: the longest sequence (the largest batch) that fits; 0 if none.
        plans: of Mango, by kinds of layers: those of the row, and those at ``longest``.
    """

    method: str
    weights: int
    gradients: int
    state: int
    activations: int
    workspace: int
    peak: int
    fits: bool
    longest: int
    plans: list[dict[str, Any]] | None = None
    longest_plans: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Report:
    """What ``plan`` found."""

    model: str
    parameters: int
    gpu: str
    total: int
    usable: int
    source: str
    axis: str
    seq: int
    batch: int
    dtype: str
    exact: bool
    rows: list[Row]

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def plan(
    model: str | Target,
    gpu: str = "rtx5090",
    seq: int | None = None,
    batch: int = 1,
    methods: Sequence[str] | None = None,
    dtype: str = "bf16",
    rank: int | float = 1 / 8,
    reserve: int | str = gpus.RESERVE,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Plan a training run on one card, without activation checkpointing.

    Weights, gradients and optimizer state are exact; saved activations are those of a forward pass on the meta device. Gradients are
    taken to be freed before the next forward pass (``zero_grad``'s default). What is not modelled: the allocator's fragmentation, cuBLAS'
    and cuDNN's own workspaces, several cards.

    Args:
        model: a name of ``mango.planner.targets``, the path of a Hugging Face config.json, or a Target.
        gpu: a card of ``mango.planner.gpus``.
        seq: tokens a sequence; None takes the model's own. Not for models whose inputs have one size.
        batch: sequences or images in a forward pass.
        methods: rows, of ``METHODS``; None = all but those that convert linear layers, which take up to minutes.
        dtype: of weights and gradients: bf16, fp16 or fp32.
        rank: GaLore's and that of Mango's fixed plan, as in LayerPlan.
        reserve: bytes of the card that are left alone, as ``parse_budget`` takes them.
        progress: told what is being computed.

    Raises: ConfigError for a name or number that is not legal. MissingExtra for a model whose library is absent.
    """
    card, found = gpus.find(gpu), target(model)
    # converted layers are followed one by one, minutes for a model of billions of parameters
    usual = [name for name, each in METHODS.items() if each.mole is None]
    chosen = {name: method(name) for name in (usual if methods is None else methods)}
    if dtype not in DTYPES:
        raise ConfigError.of("dtype", dtype, "one of " + ", ".join(DTYPES))
    for field, value in (("seq", found.size if seq is None else seq), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError.of(field, value, "an integer >= 1")
    if seq is not None and found.axis == "batch":
        raise ConfigError.of("seq", seq, f"left out: the inputs of {found.name} have one size")
    LayerPlan(rank=rank)
    usable = card.nbytes - parse_budget(reserve, field="reserve")
    if usable <= 0:
        raise ConfigError.of("reserve", reserve, f"less than the card's {card.nbytes} bytes")
    planner = _Planner(found, usable, found.size if seq is None else seq, batch, rank, progress or (lambda _: None))
    rows = [planner.row(name, each, DTYPES[dtype] if each.dtype is None else each.dtype) for name, each in chosen.items()]
    return Report(
        found.name,
        found.parameters,
        card.title,
        card.nbytes,
        usable,
        gpus.SOURCE,
        found.axis,
        planner.seq,
        batch,
        dtype,
        all(growth.exact for growth in planner.growths.values()),
        rows,
    )


class _Planner:
    """Rows for one model and card; the traces are shared between methods."""

    def __init__(self, found: Target, usable: int, seq: int, batch: int, rank: int | float, progress: Callable[[str], None]) -> None:
        self.target, self.usable, self.seq, self.batch, self.rank, self.progress = found, usable, seq, batch, rank, progress
        self.shapes = {name: tuple(param.shape) for name, param in found.module.named_parameters() if param.requires_grad}
        self.growths: dict[tuple[torch.dtype, str], Growth] = {}

    def growth(self, dtype: torch.dtype, mole: Mapping[str, str | int] | None) -> Growth:
        """Over sequence lengths at this batch, or over batches; of the model as it is, or with its linear layers converted."""
        key = dtype, str(mole)
        if key not in self.growths:
            how = "" if mole is None else ", " + ", ".join(f"{field} {value}" for field, value in mole.items())
            self.progress(f"{self.target.name} on the meta device, {str(dtype).removeprefix('torch.')}{how}")

            def measure(size: int) -> Trace:
                batch, length = (self.batch, size) if self.target.axis == "sequence" else (size, self.seq)
                with _converted(self.target, mole):
                    return trace(self.target.module, lambda model: self.target.loss(model, batch, length, dtype), dtype)

            if mole is not None:
                measure(UNITS[self.target.axis])  # makes the codecs' tables, which would be in the first trace alone
            self.growths[key] = Growth(measure, UNITS[self.target.axis])
        return self.growths[key]

    def row(self, name: str, each: Method, dtype: torch.dtype) -> Row:
        self.progress(name)
        growth = self.growth(dtype, each.mole)
        size = self.seq if self.target.axis == "sequence" else self.batch
        if not each.budget:
            plans: LayerPlan | dict[str, LayerPlan] = LayerPlan(rank=self.rank)
            need = self._need(each, dtype, plans)
            longest = growth.longest(need.peak, self.usable)
            described = self._describe(plans) if each.optimizer == "mango" else None
            return need.row(name, growth.at(size), self.usable, longest, described, described if longest else None)
        least = self._least()
        cheapest = self._need(each, dtype, least)
        longest = growth.longest(cheapest.peak, self.usable)
        here, there = (self._fill(each, dtype, growth.at(at)) if 0 < at <= longest else least for at in (size, longest))
        need = self._need(each, dtype, here)
        return need.row(name, growth.at(size), self.usable, longest, self._describe(here), self._describe(there) if longest else None)

    def _need(self, each: Method, dtype: torch.dtype, plans: LayerPlan | Mapping[str, LayerPlan]) -> _Need:
        exclude = self.target.patterns() if each.optimizer in ("muon", "galore", "galore8bit") else []
        sizes = [prod(shape) * dtype.itemsize for shape in self.shapes.values()]
        return _Need(
            weights=_weights(self.target.module, dtype),
            gradients=max(sizes, default=0) if each.fused else sum(sizes),
            state=state_nbytes(each.optimizer, self.shapes, dtype, exclude, self.rank, plans),
            scratch=scratch_nbytes(each.optimizer, self.shapes, dtype, exclude, self.rank, plans, each.fused),
            fused=each.fused,
        )

    def _least(self) -> dict[str, LayerPlan]:
        """The smallest candidate of each matrix."""
        named = {name: param for name, param in self.target.module.named_parameters() if param.requires_grad}
        every = plans_for(named.items(), "1e9 bytes/param")
        return {name: min(LADDER, key=lambda rung: layer_nbytes(named[name].shape, rung)) for name in every}

    def _fill(self, each: Method, dtype: torch.dtype, found: Trace) -> dict[str, LayerPlan]:
        """The best plans that leave the peak within the card, where the smallest plans do."""
        plans = self._least()
        need = self._need(each, dtype, plans)
        room = self.usable - (need.peak(found) - need.state)
        while True:
            better = plans_for(self.target.module.named_parameters(), room)
            need = self._need(each, dtype, better)
            if need.peak(found) <= self.usable:
                return better
            room = min(room - 1, self.usable - (need.peak(found) - need.state))  # its step holds more than that of the smallest plans
            if room < self._need(each, dtype, plans).state:
                return plans

    def _describe(self, plans: LayerPlan | Mapping[str, LayerPlan]) -> list[dict[str, Any]]:
        """Layers of one shape and plan together: how many, the first one's name, shape and plan."""
        groups: dict[tuple[tuple[int, ...], LayerPlan | None], list[str]] = {}
        for name, shape in self.shapes.items():
            chosen = applied(plans, name, shape) if isinstance(plans, LayerPlan) else plans.get(name)
            groups.setdefault((shape, chosen if layer_nbytes(shape, chosen) != layer_nbytes(shape, None) else None), []).append(name)
        return [
            {"layers": len(names), "first": names[0], "shape": list(shape), "plan": chosen.plain()}
            for (shape, chosen), names in groups.items()
            if chosen is not None
        ]


@contextmanager
def _converted(target: Target, mole: Mapping[str, Any] | None) -> Iterator[None]:
    """Inside, the model's linear layers but its ends are converted. Raises: ConfigError when it has none to convert."""
    if mole is None:
        yield
        return
    convert(target.module, MoleConfig.of({"targets": "all", "exclude": tuple(target.patterns()), **mole}))
    try:
        yield
    finally:
        revert(target.module)


@dataclass(frozen=True)
class _Need:
    """What a method holds, whatever the inputs."""

    weights: int
    gradients: int
    state: int
    scratch: int
    fused: bool

    def peak(self, found: Trace) -> int:
        kept = self.weights + self.state
        return kept + (found.fused_peak(self.scratch) if self.fused else max(found.peak(), self.gradients + self.scratch))

    def row(self, name: str, found: Trace, usable: int, longest: int, plans: Any, longest_plans: Any) -> Row:
        workspace = found.temporary(self.scratch) if self.fused else max(found.temporary(), self.scratch)
        peak = self.peak(found)
        sizes = (self.weights, self.gradients, self.state, found.activations, workspace, peak)
        return Row(name, *sizes, peak <= usable, longest, plans, longest_plans)


def _weights(module: torch.nn.Module, dtype: torch.dtype) -> int:
    """Bytes of parameters, the floating-point ones in ``dtype``, and of buffers; tied ones once."""
    parameters = sum(p.numel() * (dtype.itemsize if p.is_floating_point() else p.dtype.itemsize) for p in module.parameters())
    return parameters + sum(buffer.nbytes for buffer in module.buffers())
