"""One LayerPlan per layer under a budget of optimizer state in bytes: the exact optimum, never above the budget."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor

from mango import codecs
from mango.errors import ConfigError
from mango.optim.accounting import layer_nbytes
from mango.optim.plan import LayerPlan, is_matrix, matrix_shape
from mango.policy.base import Observation, Policy
from mango.policy.knapsack import solve

Shape = Sequence[int]
Score = Callable[[str, Shape, LayerPlan], float]  # of a layer's name, shape and plan; larger is better

DELAYED = 0.9  # worth of a step that comes one step late: the decay of Adam's first moment, within whose window it still counts
# From most to least memory.
LADDER = tuple(LayerPlan(rank=1 / part, error=error) for part in (2, 4, 8, 16, 32, 64) for error in ("gradient", "codec", "none"))

UNITS = {"b": 1, "bytes": 1, "byte": 1} | {
    f"{prefix}{suffix}": base**power for suffix, base in (("b", 1000), ("ib", 1024)) for power, prefix in enumerate("kmgt", start=1)
}
LEGAL = "bytes as a number, with a unit (B, kB, MB, GB, TB, KiB, MiB, GiB, TiB) such as '24GiB', or per parameter such as '0.5 bytes/param'"


def parse_budget(value: int | float | str, parameters: int | None = None, field: str = "budget") -> int:
    """A budget in whole bytes, rounded down.

    Args:
        value: bytes, or text: a number, a number and a unit (case does not matter; MB is 10^6, MiB is 2^20), or a number and "bytes/param".
        parameters: what "bytes/param" multiplies; None makes it illegal.
        field: what the value is called in messages.

    Raises: ConfigError.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) and value >= 0:
        return int(value)
    text = value.strip().lower() if isinstance(value, str) else ""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(?:e([+-]?\d{1,2}))?\s*([a-z]*)\s*(/\s*param(?:eter)?)?", text)
    if match is None or (match[3] and match[3] not in UNITS) or (match[4] and not match[3]):
        raise ConfigError.of(field, value, LEGAL)
    if match[4] and parameters is None:
        raise ConfigError.of(field, value, "a number of bytes: here it is not known of how many parameters")
    number = Fraction(match[1]) * Fraction(10) ** int(match[2] or 0) * UNITS[match[3] or "b"]
    return int(number * (parameters or 0) if match[4] else number)


def quality(name: str, shape: Shape, plan: LayerPlan) -> float:
    r"""The prior worth of a plan: how much of a gradient's energy it is expected to use in time, in parameters.

    .. math:: mn \, \frac{s_r\, \alpha_P \alpha_U \alpha_M}{1 - \gamma (1 - s_r)\, \alpha_E}

    for an (m, n) layer, m <= n. :math:`s_r` is the share of the energy that r directions capture when that of the i-th falls as 1/i: a
    prior, not a measurement. It is never below the certified share of r columns (theorem T3, at most r/m). What is missed is offered
    again one step later as far as the memory kept it, which makes the sum geometric; a step of delay costs the factor
    :math:`\gamma`. The alphas are the codecs' certificates (T1) for basis, factor, moments and error, the last times the error's decay;
    without error feedback :math:`\alpha_E = 0`. Replace it by a ``score`` of your own where captured energies have been measured.
    """
    rows, cols = matrix_shape(shape)
    share = _harmonic(plan.columns(rows, cols, name)) / _harmonic(min(rows, cols))
    used = _alpha(plan.basis_codec) * _alpha(plan.moment_codec) * (_alpha(plan.factor_codec) if plan.factor_codec else 1.0)
    kept = plan.error_decay * {"none": 0.0, "gradient": 1.0, "codec": _alpha(plan.error_codec)}[plan.error]
    return prod(shape) * share * used / (1.0 - DELAYED * (1.0 - share) * kept)


@cache
def _harmonic(n: int) -> float:
    return sum(1.0 / i for i in range(1, n + 1))


@cache
def _alpha(codec: str) -> float:
    return codecs.get(codec).alpha()


def choose(
    layers: Mapping[str, Shape],
    candidates: Sequence[LayerPlan | Mapping[str, Any]] = LADDER,
    budget: int | float | str = "0.5 bytes/param",
    score: Score = quality,
    field: str = "budget",
) -> dict[str, LayerPlan]:
    """The plans with the largest total score whose state is at most ``budget``; of equal scores the smallest state (see ``solve``).

    Args:
        layers: name -> shape, for matrices (see ``is_matrix``); more than two dimensions fold to (shape[0], product of the rest).
        candidates: plans to choose from, in order of preference among equals. An integer rank that does not fit a layer is left out there.
        budget: as ``parse_budget`` takes it; "bytes/param" is per value of these layers.
        score: worth of a plan for a layer, a finite number.
        field: what the budget is called in messages.

    Raises: ConfigError for a budget that cannot be read or met (the message says the smallest that can), and for illegal candidates.
    """
    return _choose(layers, candidates, parse_budget(budget, sum(map(prod, layers.values())), field), score, 0, (field, budget))


def plans_for(
    named_parameters: Iterable[tuple[str, Tensor]],
    budget: int | float | str,
    candidates: Sequence[LayerPlan | Mapping[str, Any]] | None = None,
    score: Score = quality,
    field: str = "budget",
    plain: Collection[str] = (),
) -> dict[str, LayerPlan]:
    """The best plan for every matrix of a model, such that ``Mango.nbytes()``, small tensors' plain AdamW included, is at most ``budget``.

    Parameters that do not require a gradient have no state, tied ones are counted once, and parameters that are not matrices are not in
    the answer, nor are those named in ``plain``, which keep plain AdamW. "bytes/param" is per trainable value.

    Raises: as ``choose``.
    """
    shapes: dict[str, Shape] = {}
    seen: set[int] = set()
    for name, parameter in named_parameters:
        if parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            shapes[name] = tuple(parameter.shape)
    return plans_for_shapes(shapes, budget, candidates, score, field, plain)


def plans_for_shapes(
    shapes: Mapping[str, Shape],
    budget: int | float | str,
    candidates: Sequence[LayerPlan | Mapping[str, Any]] | None = None,
    score: Score = quality,
    field: str = "budget",
    plain: Collection[str] = (),
    held: int = 0,
) -> dict[str, LayerPlan]:
    """``plans_for`` when the trainable parameters are known by their shapes, and ``held`` bytes of the budget are spent on other things."""
    limit = parse_budget(budget, sum(map(prod, shapes.values())), field)
    matrices = {name: shape for name, shape in shapes.items() if is_matrix(shape) and name not in plain}
    spent = sum(layer_nbytes(shape, None) for name, shape in shapes.items() if name not in matrices)
    return _choose(matrices, LADDER if candidates is None else candidates, limit, score, spent, (field, budget), held)


def groups_for(
    params: Iterable[Any],
    budget: int | float | str,
    plan: LayerPlan | Mapping[str, Any] | None = LayerPlan(),  # noqa: B008  (frozen)
    candidates: Sequence[LayerPlan | Mapping[str, Any]] | None = None,
    score: Score = quality,
    field: str = "budget",
) -> list[dict[str, Any]]:
    """Parameter groups for ``Mango``, one for each plan, so that layers of one shape and plan are stepped together.

    Args:
        params: as an optimizer takes them: parameters, (name, parameter) pairs, or groups of either, which are cut further. What does not
            require a gradient is left out: it is not stepped, and would break the budget if it were later.
        plan: of groups that name none; where it is None, plain AdamW stays.
        budget, candidates, score, field: as ``plans_for`` takes them.

    Raises: as ``choose``.
    """
    given = list(params)
    groups = [dict(group) for group in given] if given and isinstance(given[0], dict) else [{"params": given}]
    for number, group in enumerate(groups):
        members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        names = [f"param_groups[{number}]['params'][{place}]" for place in range(len(members))]
        named = [member if isinstance(member, tuple) else (name, member) for name, member in zip(names, members, strict=True)]
        group["params"] = [(name, param) for name, param in named if param.requires_grad]
    plain = {name for group in groups if group.get("plan", plan) is None for name, _ in group["params"]}
    plans = plans_for([pair for group in groups for pair in group["params"]], budget, candidates, score, field, plain)
    cut: list[dict[str, Any]] = []
    for group in groups:
        members_of: dict[LayerPlan | None, list[tuple[str, Tensor]]] = {}
        for name, param in group["params"]:
            members_of.setdefault(plans.get(name), []).append((name, param))
        cut += [{**group, "params": members, "plan": chosen} for chosen, members in members_of.items()]
    return cut


@dataclass(eq=False)
class Budget(Policy):
    """The policy that spends a number of bytes of optimizer state as well as it can, exactly. It never changes its mind.

    Args:
        limit: as ``parse_budget`` takes it; for ``plans`` and ``groups``. ``decide`` keeps the budget of the observation.
        candidates: plans to choose from.
        score: worth of a plan for a layer.

    Raises: ConfigError for a limit that cannot be read.

    >>> from torch import nn
    >>> plans = Budget("0.7 bytes/param").plans(nn.Linear(64, 256).named_parameters())
    >>> sorted(plans)
    ['weight']
    """

    limit: int | float | str = "0.5 bytes/param"
    candidates: Sequence[LayerPlan | Mapping[str, Any]] = LADDER
    score: Score = quality

    def __post_init__(self) -> None:
        parse_budget(self.limit, 1)

    def plans(self, named_parameters: Iterable[tuple[str, Tensor]]) -> dict[str, LayerPlan]:
        """See ``plans_for``."""
        return plans_for(named_parameters, self.limit, self.candidates, self.score)

    def groups(self, params: Iterable[Any]) -> list[dict[str, Any]]:
        """Parameter groups for ``Mango``, see ``groups_for``."""
        return groups_for(params, self.limit, candidates=self.candidates, score=self.score)

    def scores(self, seen: Observation) -> Tensor:
        """The worth of each action's plan. ``candidates`` are not asked: under way a policy chooses among its actions."""
        layers = zip(seen.names, seen.shapes, seen.bases, strict=True)
        plans = [(name, shape, [self.actions.plan(action, base) for action in range(len(self.actions))]) for name, shape, base in layers]
        return torch.tensor([[self.score(name, shape, plan) for plan in row] for name, shape, row in plans], dtype=torch.float64)

    def decide(self, seen: Observation) -> list[int]:
        if seen.budget is None:
            return super().decide(seen)
        legal = [[action for action, ok in enumerate(row) if ok] for row in seen.allowed.tolist()]
        nbytes, worth = seen.nbytes.tolist(), self.scores(seen).tolist()
        picked = solve([[(nbytes[n][action], worth[n][action]) for action in row] for n, row in enumerate(legal)], seen.budget)
        if picked is None:
            return super().decide(seen)  # which says the smallest budget that can be met
        return [row[index] for row, index in zip(legal, picked, strict=True)]


def _choose(
    layers: Mapping[str, Shape],
    candidates: Sequence[LayerPlan | Mapping[str, Any]],
    limit: int,
    score: Score,
    plain: int,  # bytes that are spent whatever is chosen
    asked: tuple[str, int | float | str],  # field and value, for messages
    held: int = 0,  # bytes that are spent on other things than state
) -> dict[str, LayerPlan]:
    plans = [LayerPlan.of(candidate) for candidate in candidates]
    if not plans:
        raise ConfigError.of("candidates", candidates, "at least one LayerPlan")
    fitting = {name: _fitting(name, shape, plans) for name, shape in layers.items()}
    classes = []
    for name, shape in layers.items():
        options = [(layer_nbytes(shape, plan), float(score(name, shape, plan))) for plan in fitting[name]]
        for plan, (_, worth) in zip(fitting[name], options, strict=True):
            if not isfinite(worth):
                raise ConfigError.of(f"score({name!r}, {plan})", worth, "a finite number")
        classes.append(options)
    picked = solve(classes, limit - held - plain)
    if picked is None:
        least = sum(min(weight for weight, _ in options) for options in classes)
        raise ConfigError.of(
            *asked,
            f"at least {held + plain + least} bytes, of which "
            + (f"{held} for weights, gradients and saved activations, " if held else "")
            + f"{plain} for tensors that keep plain AdamW and {least} for {len(layers)} matrices"
            + " under the smallest candidate plan of each; less takes candidates of lower rank, without error, or with smaller codecs,"
            " or fewer trainable parameters" + (", or fewer activations (a shorter sequence, a smaller batch)" if held else ""),
        )
    return {name: fitting[name][index] for name, index in zip(layers, picked, strict=True)}


def _fitting(name: str, shape: Shape, plans: Sequence[LayerPlan]) -> list[LayerPlan]:
    if not is_matrix(shape):
        raise ConfigError.of(f"shape of {name}", tuple(shape), "two dimensions or more, and as many values as Mango compresses")
    small = min(matrix_shape(shape))
    found = [plan for plan in plans if isinstance(plan.rank, float) or plan.rank <= small]
    if not found:
        raise ConfigError.of("candidates", [plan.rank for plan in plans], f"one of rank at most {small}, the smaller dimension of {name}")
    return found
