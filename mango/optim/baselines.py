"""The peers, each by its maintained package, called alike: ``factory(matrices, rest, lr=…, rest_lr=…, **options)``.

``matrices`` and ``rest`` are (name, parameter) pairs from ``split``; ``lr`` belongs to the matrices, ``rest_lr`` to the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from mango.errors import ConfigError, MissingExtra
from mango.optim.adarankgrad import AdaRankGrad
from mango.optim.chain import Chain, Part
from mango.optim.mango import Mango
from mango.optim.muon import Muon
from mango.optim.plan import LayerPlan
from mango.optim.split import Named


def _groups(matrices: Named, rest: Named, rest_lr: float) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = [
        {"params": [param for _, param in matrices]},
        {"params": [param for _, param in rest], "lr": rest_lr},
    ]
    return [group for group in groups if group["params"]]


def _whole(
    factory: Callable[..., torch.optim.Optimizer], matrices: Named, rest: Named, lr: float, rest_lr: float | None, **options: Any
) -> Chain:
    """One optimizer for all parameters, which sees convolutions as matrices."""
    groups = _groups(matrices, rest, lr if rest_lr is None else rest_lr)
    return Chain([Part(lambda inner: factory(inner, lr=lr, **options), groups, fold=True)])


def adamw(matrices: Named, rest: Named, lr: float = 1e-3, rest_lr: float | None = None, weight_decay: float = 0.0, **options: Any) -> Chain:
    """torch.optim.AdamW, fused (arXiv:1711.05101)."""
    return _whole(torch.optim.AdamW, matrices, rest, lr, rest_lr, weight_decay=weight_decay, **{"fused": True, **options})


def sgd(matrices: Named, rest: Named, lr: float = 1e-1, rest_lr: float | None = None, momentum: float = 0.9, **options: Any) -> Chain:
    """torch.optim.SGD with momentum."""
    return _whole(torch.optim.SGD, matrices, rest, lr, rest_lr, momentum=momentum, **options)


def adafactor(
    matrices: Named, rest: Named, lr: float = 1e-2, rest_lr: float | None = None, weight_decay: float = 0.0, **options: Any
) -> Chain:
    """torch.optim.Adafactor (arXiv:1804.04235), whose step is relative to the size of the parameter.

    Convolutions are folded, or their second moment would be factored over the 3x3 window and be two thirds as large as they are.
    """
    return _whole(torch.optim.Adafactor, matrices, rest, lr, rest_lr, weight_decay=weight_decay, **options)


def adamw8bit(
    matrices: Named, rest: Named, lr: float = 1e-3, rest_lr: float | None = None, weight_decay: float = 0.0, **options: Any
) -> Chain:
    """bitsandbytes' AdamW8bit (arXiv:2110.02861); tensors below 4096 values keep 32-bit moments, its default."""
    bitsandbytes = _extra("bitsandbytes", "AdamW8bit")
    return _whole(bitsandbytes.optim.AdamW8bit, matrices, rest, lr, rest_lr, weight_decay=weight_decay, **options)


def muon(
    matrices: Named,
    rest: Named,
    lr: float = 2e-2,
    rest_lr: float = 1e-3,
    weight_decay: float = 0.0,
    rest_betas: tuple[float, float] = (0.9, 0.999),
    rates: dict[str, float] | None = None,
    **options: Any,
) -> Chain:
    """Muon (mango.optim.muon) for the matrices, convolutions folded; fused AdamW for the rest.

    ``rates``: regular expression -> AdamW's rate for those of the rest in whose names it is found first, as nanochat gives embedding and
    head rates of their own.
    """
    return Chain(
        [
            Part(
                lambda inner: Muon(inner, lr=lr, weight_decay=weight_decay, **options),
                [{"params": [param for _, param in matrices]}],
                fold=True,
            ),
            Part(
                lambda inner: torch.optim.AdamW(inner, lr=rest_lr, weight_decay=weight_decay, betas=rest_betas, fused=True),
                _by_rate(rest, rest_lr, rates or {}),
            ),
        ]
    )


def _by_rate(rest: Named, rest_lr: float, rates: dict[str, float]) -> list[dict[str, Any]]:
    """One group for each rate. Raises: ConfigError for a pattern that is found in no name."""
    groups: list[dict[str, Any]] = [{"params": [], "lr": rest_lr}, *({"params": [], "lr": rate} for rate in rates.values())]
    for name, param in rest:
        found = (number for number, pattern in enumerate(rates, 1) if re.search(pattern, name))
        groups[next(found, 0)]["params"].append(param)
    for pattern, group in zip(rates, groups[1:], strict=True):
        if not group["params"]:
            raise ConfigError.of("rates", pattern, "a regular expression found in the name of a parameter that Muon leaves to AdamW")
    return [group for group in groups if group["params"]]


def pagedadamw8bit(
    matrices: Named, rest: Named, lr: float = 1e-3, rest_lr: float | None = None, weight_decay: float = 0.0, **options: Any
) -> Chain:
    """bitsandbytes' PagedAdamW8bit: AdamW8bit whose moments move to the host when a GPU is full. Needs CUDA."""
    if any(param.device.type != "cuda" for _, param in [*matrices, *rest]):
        raise ConfigError.of(
            "optimizer", "pagedadamw8bit", "one of the others for parameters that are not on a CUDA device: it pages GPU memory"
        )
    bitsandbytes = _extra("bitsandbytes", "PagedAdamW8bit")
    return _whole(bitsandbytes.optim.PagedAdamW8bit, matrices, rest, lr, rest_lr, weight_decay=weight_decay, **options)


def galore(matrices: Named, rest: Named, **options: Any) -> Chain:
    """galore-torch's GaLoreAdamW (arXiv:2403.03507): a basis by SVD every ``update_proj_gap`` steps. ``rank`` as in LayerPlan."""
    return _galore(_extra("galore_torch", "GaLore", "galore-torch").GaLoreAdamW, matrices, rest, no_deprecation_warning=True, **options)


def galore8bit(matrices: Named, rest: Named, **options: Any) -> Chain:
    """GaLore with 8-bit moments: galore-torch's projection around bitsandbytes' AdamW8bit, on a CPU too.

    galore-torch's own GaLoreAdamW8bit calls CUDA at every step, and hands bitsandbytes arguments by the places that they had in older
    releases (clipping by percentile arrives as a largest norm). Projected gradients below ``min_8bit_size`` = 4096 values keep 32-bit
    moments, as in AdamW8bit.
    """
    base, project = _extra("bitsandbytes", "8-bit GaLore").optim.AdamW8bit, _projector()

    class AdamW8bit(base):  # type: ignore[misc, valid-type]
        """Steps a matrix of zeros, of the projected gradient's shape, in the parameter's place; where that ends is the projected step."""

        def init_state(self, group: dict[str, Any], p: torch.Tensor, *place: int) -> None:
            if "rank" in group:
                self.state[p]["projector"] = project(group)  # moments follow, when their shape is known
            else:
                super().init_state(group, p, *place)

        def update_step(self, group: dict[str, Any], p: torch.Tensor, *place: int) -> None:
            if "rank" not in group:
                return super().update_step(group, p, *place)
            state, weight, gradient = self.state[p], p.data, p.grad
            projected = state["projector"].project(gradient, state.get("step", 0))
            p.data, p.grad = torch.zeros_like(projected), projected
            if "state1" not in state:
                super().init_state(group, p, *place)
            super().update_step({**group, "weight_decay": 0.0}, p, *place)
            p.data, p.grad, step = weight, gradient, p.data
            p.add_(state["projector"].project_back(step)).mul_(1.0 - group["lr"] * group["weight_decay"])  # in galore-torch's order

    return _galore(AdamW8bit, matrices, rest, **options)


def _projector() -> Callable[[dict[str, Any]], Any]:
    """Parameter group -> galore-torch's projector."""
    projector = _extra("galore_torch", "GaLore", "galore-torch").galore_projector.GaLoreProjector
    return lambda group: projector(**{key: group[key] for key in ("rank", "update_proj_gap", "scale", "proj_type")})


def _by_rank(matrices: Named, rank: int | float) -> dict[int, list[torch.Tensor]]:
    """The matrices by their number of columns, ``rank`` as in LayerPlan."""
    plan, by_rank = LayerPlan(rank=rank), dict[int, list[torch.Tensor]]()
    for name, param in matrices:
        by_rank.setdefault(plan.columns(param.shape[0], param[0].numel(), name), []).append(param)
    return by_rank


def _galore(
    base: type[torch.optim.Optimizer],
    matrices: Named,
    rest: Named,
    lr: float = 1e-3,
    rest_lr: float | None = None,
    weight_decay: float = 0.0,
    rank: int | float = 1 / 8,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    proj_type: str = "std",
    **options: Any,
) -> Chain:
    """``base`` projects in groups with a rank, and keeps a projector in the state of their parameters."""
    project = _projector()
    groups: list[dict[str, Any]] = []
    for columns, params in _by_rank(matrices, rank).items():
        groups.append({"params": params, "rank": columns, "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type})
    groups.append({"params": [param for _, param in rest], "lr": lr if rest_lr is None else rest_lr})

    class GaLore(base):  # type: ignore[misc, valid-type]
        """With a state that loads with weights_only=True: the projector's tensor in place of the projector."""

        def state_dict(self) -> dict[str, Any]:
            saved = super().state_dict()
            for number, state in saved["state"].items():
                if "projector" in state:
                    state = saved["state"][number] = dict(state)
                    state["ortho_matrix"] = state.pop("projector").ortho_matrix
            return saved

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            for group in self.param_groups:
                for param in group["params"]:
                    state = self.state.get(param, {})
                    if "ortho_matrix" in state:
                        state["projector"] = project(group)
                        state["projector"].ortho_matrix = state.pop("ortho_matrix")

    groups = [group for group in groups if group["params"]]
    return Chain([Part(lambda inner: GaLore(inner, lr=lr, weight_decay=weight_decay, **options), groups, fold=True)])


def adarankgrad(
    matrices: Named,
    rest: Named,
    lr: float = 1e-3,
    rest_lr: float | None = None,
    rank: int | float = 1 / 8,
    **options: Any,
) -> Chain:
    """AdaRankGrad (arXiv:2410.17881) with at most ``rank`` columns, as in LayerPlan; plain AdamW for the rest."""
    groups = [{"params": params, "rank": columns} for columns, params in _by_rank(matrices, rank).items()]
    groups.append({"params": [param for _, param in rest], "lr": lr if rest_lr is None else rest_lr})
    return Chain([Part(lambda inner: AdaRankGrad(inner, lr=lr, **options), [group for group in groups if group["params"]], fold=True)])


def mango(
    matrices: Named,
    rest: Named,
    lr: float = 1e-3,
    rest_lr: float | None = None,
    weight_decay: float = 0.0,
    plan: LayerPlan | dict[str, Any] | None = None,
    **options: Any,
) -> Mango:
    """Mango for the matrices, its plain AdamW for the rest."""
    chosen = LayerPlan.of(plan if plan is not None else {})
    groups: list[dict[str, Any]] = [
        {"params": matrices, "plan": chosen},
        {"params": rest, "plan": None, "lr": lr if rest_lr is None else rest_lr},
    ]
    return Mango([group for group in groups if group["params"]], lr=lr, weight_decay=weight_decay, **options)


def mole(
    matrices: Named, rest: Named, lr: float = 1e-3, rest_lr: float | None = None, weight_decay: float = 0.0, **options: Any
) -> torch.optim.Optimizer:
    """MoleOptimizer: factors where converted layers leave them, AdamW for every other gradient."""
    from mango.mole.optimizer import MoleOptimizer  # whose AdamW is a module of this package

    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": rest, "lr": lr if rest_lr is None else rest_lr}]
    return MoleOptimizer([group for group in groups if group["params"]], lr=lr, weight_decay=weight_decay, **options)


def _extra(package: str, purpose: str, distribution: str | None = None) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise MissingExtra.of(distribution or package, "experiments", purpose) from error


def checked(
    factory: Callable[..., torch.optim.Optimizer], name: str, matrices: Named, rest: Named, options: dict[str, Any]
) -> torch.optim.Optimizer:
    """Calls a factory; what the package says about a bad option becomes a ConfigError that names the optimizer."""
    if not matrices and not rest:
        raise ConfigError.of("model", "no trainable parameter", "at least one parameter with requires_grad")
    try:
        return factory(matrices, rest, **options)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError.of(f"options of {name}", options, str(error)) from error
