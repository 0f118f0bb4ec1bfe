"""The compressed state and the step of a stack of same-shaped layers: a handful of batched products, no loop over layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from mango import codecs
from mango.errors import ConfigError
from mango.feedback.buffer import ErrorBuffer
from mango.optim.plan import LayerPlan
from mango.stacked import Stacked
from mango.subspace import (
    captured_energy,
    counter_generator,
    orthonormalize,
    power_step,
    principal_cosines,
    rotate_moments,
    rotation,
    scout_alpha,
)


@dataclass(frozen=True)
class Hyper:
    """What a step needs beside gradients: the group's options and the counters."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    maximize: bool
    step: int  # 1 for the first
    seed: tuple[int, ...]  # counters that are never used twice: (seed, step, index of the stack)


class LayerStack:
    """State of ``layers`` parameters of one shape, and their common step.

    The basis P is (m, r) on the smaller side of the folded matrix, the moments are (r, n) on the larger one.

    Args:
        plan: as of the group.
        shape: of one parameter; more than two dimensions fold to (shape[0], product of the rest).
        layers: how many.
        device: of the parameters.
        name: of the first, for messages.
    """

    def __init__(self, plan: LayerPlan, shape: Sequence[int], layers: int, device: torch.device, name: str) -> None:
        rows, cols = shape[0], prod(shape[1:])
        self.plan, self.rows, self.cols, self.layers, self.device = plan, rows, cols, layers, device
        self.small, self.large = min(rows, cols), max(rows, cols)
        self.rank = plan.columns(rows, cols, name)
        self.scouts = min(plan.scouts, self.rank) if self.rank < self.small else 0
        self.basis = Stacked(plan.basis_codec, layers, (self.small, self.rank), device)
        self.first = Stacked(plan.moment_codec, layers, (self.rank, self.large), device)
        # the root halves the decades that the codec must span, and its error is relative in the update's denominator
        self.second_root = Stacked(plan.moment_codec, layers, (self.rank, self.large), device)
        self.error = ErrorBuffer(plan.error, plan.error_codec, layers, (rows, cols), device)
        self.factor = codecs.get(plan.factor_codec) if plan.factor_codec else None

    def parts(self) -> dict[str, Tensor]:
        """Every stored tensor as "quantity.part", views (layers, …)."""
        stores = {"basis": self.basis, "exp_avg": self.first, "exp_avg_sq_root": self.second_root}
        if self.error.store is not None:
            stores["error"] = self.error.store
        return {f"{quantity}.{part}": tensor for quantity, store in stores.items() for part, tensor in store.parts().items()}

    def views(self, layer: int) -> dict[str, Tensor]:
        """The state of one layer: views of the stack."""
        return {name: part[layer] for name, part in self.parts().items()}

    def load(self, layer: int, state: Mapping[str, Any], name: str) -> None:
        """Copy one layer's saved tensors in. Raises ConfigError when they do not fit the plan."""
        views = self.views(layer)
        for part in views.keys() | (state.keys() - {"step"}):
            saved, own = state.get(part), views.get(part)
            if own is None or not isinstance(saved, Tensor) or saved.shape != own.shape or saved.dtype != own.dtype:
                found = f"{tuple(saved.shape)} {saved.dtype}" if isinstance(saved, Tensor) else saved
                legal = "absent" if own is None else f"{tuple(own.shape)} {own.dtype}"
                raise ConfigError.of(f"state of {name}, {part}", found, f"{legal} under its plan, {self.plan}")
            own.copy_(saved)

    @torch.no_grad()
    def step(
        self,
        params: Sequence[Tensor],  # layers, each of the stack's shape
        grads: Sequence[Tensor],  # layers, finite
        hyper: Hyper,
        workspace: Tensor,  # (layers, rows, cols) float32, overwritten
        names: Sequence[str] | None = None,  # asks for diagnostics
    ) -> dict[str, dict[str, float]]:
        """One step of every layer in place. Returns the diagnostics by name, empty unless asked for."""
        generator = counter_generator(hyper.seed, self.device)
        h = self.error.compensate(grads, workspace, -1.0 if hyper.maximize else 1.0)
        a = h if self.rows <= self.cols else h.mT  # (layers, m, n)

        shape = (self.layers, self.small, self.rank if hyper.step == 1 else self.scouts)
        scouts = torch.randn(shape, generator=generator, device=self.device) if shape[-1] else None
        old = self.basis.read()  # (layers, m, r)
        basis, _ = power_step(old, a, scouts)
        exact = basis.mT @ a  # (layers, r, n)
        u = exact if self.factor is None else self.factor.decode(self.factor.encode(exact, generator=generator))

        adam = self._moments(u, rotation(basis, old), hyper)
        found = self._diagnose(a, basis, exact, u, old, grads, names) if names else {}
        self._subtract(h, basis, u)  # H - PU
        self.error.keep(h, generator=generator)
        if self.plan.residual and self.rank < self.small:
            h.mul_(self._residual_scale(a, u, adam).unsqueeze(-2 if self.rows <= self.cols else -1))
        else:
            h.zero_()
        self._subtract(h, basis, -adam)  # D
        self.basis.write(basis)

        if hyper.weight_decay:
            torch._foreach_mul_(list(params), 1.0 - hyper.lr * hyper.weight_decay)
        updates = [d.view(param.shape).to(param.dtype) for d, param in zip(h.unbind(0), params, strict=True)]
        torch._foreach_add_(list(params), updates, alpha=-hyper.lr)
        return found

    def _moments(self, u: Tensor, r: Tensor, hyper: Hyper) -> Tensor:
        """Adam's direction for the factor U (layers, r, n), with the moments carried to the new basis by r (layers, r, r).

        Row i of r has squared norm c <= 1: that much of the new direction lay in the old span, and the rest has no history. Left at zero,
        the missing second moment would blow the step up to (1 - beta1) / sqrt(1 - beta2) times its size, as bias correction knows only
        the age of the state. The rest is taken to have had the present factor all along, so that a wholly new direction (c = 0)
        steps as Adam's own first step does: its corrected moments are U and U².
        """
        beta1, beta2 = hyper.betas
        m, v = rotate_moments(r, self.first.read(), self.second_root.read().square())
        new = (1.0 - r.square().sum(dim=-1, keepdim=True)).clamp_(0.0, 1.0)  # (layers, r, 1)
        m.addcmul_(new, u, value=1.0 - beta1 ** (hyper.step - 1))
        v.addcmul_(new, u.square(), value=1.0 - beta2 ** (hyper.step - 1))
        m = m.mul_(beta1).add_(u, alpha=1.0 - beta1)
        v = v.mul_(beta2).addcmul_(u, u, value=1.0 - beta2)
        root = v.sqrt_()
        self.first.write(m)
        self.second_root.write(root)
        root.div_((1.0 - beta2**hyper.step) ** 0.5).add_(hyper.eps)
        return m.div_(1.0 - beta1**hyper.step).div_(root)

    def _residual_scale(self, left: Tensor, u: Tensor, adam: Tensor) -> Tensor:
        """Column scales (layers, n) of the residual H - PU (layers, m, n): Fira's ‖A_j‖ / ‖U_j‖, bounded.

        Fira's ratio has no bound where a column of U happens to be small, and Fira then limits the growth of the whole
        residual from step to step. We bound each column instead: per dimension the residual is never stepped further than the captured
        part, ‖s_j (H - PU)_j‖ / sqrt(m - r) <= ‖A_j‖ / sqrt(r). That needs no state and does not depend on the scale of a column.
        """
        per_dimension = (self.rank / (self.small - self.rank)) ** 0.5 * torch.linalg.vector_norm(left, dim=-2)
        bound = torch.maximum(torch.linalg.vector_norm(u, dim=-2), per_dimension)
        # a dead column (zero gradient, momentum left) must give a finite scale: infinity times its zero residual is not a number
        return torch.linalg.vector_norm(adam, dim=-2) / bound.clamp_min(1e-30)

    def _subtract(self, h: Tensor, basis: Tensor, factor: Tensor) -> None:
        """h (layers, rows, cols) -= basis @ factor, in the orientation of h."""
        if self.rows <= self.cols:
            h.baddbmm_(basis, factor, alpha=-1.0)
        else:
            h.baddbmm_(factor.mT, basis.mT, alpha=-1.0)

    def certified(self) -> float:
        """T3 and T4: the contraction that H -> P q(PᵀH) has for every H, in expectation over the scouts."""
        return scout_alpha(self.small, self.rank, self.scouts) * (self.factor.alpha() if self.factor is not None else 1.0)

    def _diagnose(
        self, a: Tensor, basis: Tensor, exact: Tensor, u: Tensor, old: Tensor, grads: Sequence[Tensor], names: Sequence[str]
    ) -> dict[str, dict[str, float]]:
        """Before H is overwritten: what the compression did to it."""
        total = torch.linalg.matrix_norm(a).square()  # (layers,)
        left = torch.linalg.matrix_norm(a - basis @ u).square()
        gradient = torch.stack([torch.linalg.vector_norm(grad.float()) for grad in grads])
        columns = {
            "measured": torch.where(total > 0, 1.0 - left / total, 1.0),
            "energy": captured_energy(basis, a),
            "drift": principal_cosines(basis, orthonormalize(old)).mean(dim=-1),
            "error_ratio": torch.where(gradient > 0, left.sqrt() / gradient, 0.0),
        }
        rows = torch.stack(list(columns.values()), dim=-1).tolist()
        fixed = {"certified": self.certified()}
        return {name: fixed | dict(zip(columns, row, strict=True)) for name, row in zip(names, rows, strict=True)}
