"""The compressed state and the step of a stack of same-shaped layers: a handful of batched products, no loop over layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mango import codecs, native
from mango.errors import ConfigError
from mango.feedback.buffer import ErrorBuffer
from mango.native.threads import run
from mango.optim.diagnose import diagnose
from mango.optim.plan import LayerPlan
from mango.stacked import Stacked
from mango.subspace import (
    counter_generator,
    half_step,
    matmul,
    power_step,
    rotate_moments,
    rotation,
    scout_alpha,
)

HALVES_PAY = 1 << 18  # values of a matrix from which bfloat16 products are faster than the conversion costs


def bfloat16_units(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def column_norms(x: Tensor) -> Tensor:
    """Norms of the columns of x (layers, rows, cols) float32, (layers, cols)."""
    if not native.ready(x.device):
        return torch.linalg.vector_norm(x, dim=-2)
    from mango.native import optim

    layers, rows, cols = x.shape
    squares = torch.empty(layers, cols)
    for values, sums in zip(x.contiguous(), squares, strict=True):
        run(optim.column_squares, -(-cols // optim.TILE), rows * optim.TILE, values.numpy(), sums.numpy())
    return squares.sqrt_()


@dataclass(frozen=True)
class Hyper:
    """What a step needs beside gradients: the group's options and the counters."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    maximize: bool
    step: int  # 1 for the first
    seeds: Sequence[tuple[int, ...]]  # for each layer, counters that are never used twice: (seed, step, parameter, expert)
    matmul: str  # "float32", "bfloat16", or "auto" (see mango.Mango)


class Workspace:
    """Scratch memory that the stacks of an optimizer share, by purpose: fresh pages cost a CPU as much as a pass over them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of this shape whose content is left over; it is valid until the purpose is asked for again."""
        values = prod(shape)
        held = self._held.get((purpose, dtype))
        if held is None or held.numel() < values:
            held = self._held[purpose, dtype] = torch.empty(values, dtype=dtype, device=self.device)
        return held[:values].view(shape)


class LayerStack:
    """State of ``layers`` parameters of one shape, and their common step.

    The basis P is (m, r) on the smaller side of the folded matrix, the moments are (r, n) on the larger one.

    Args:
        plan: as of the group.
        shape: of one matrix, (rows, cols).
        layers: how many.
        device: of the parameters.
        name: of the first, for messages.
    """

    def __init__(self, plan: LayerPlan, shape: tuple[int, int], layers: int, device: torch.device, name: str) -> None:
        rows, cols = shape
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

    def views(self, first: int, count: int) -> dict[str, Tensor]:
        """The state of the layers of one parameter: views of the stack, (count, …), or (…) for a single layer."""
        return {name: part[first] if count == 1 else part[first : first + count] for name, part in self.parts().items()}

    def load(self, first: int, count: int, state: Mapping[str, Any], name: str) -> None:
        """Copy one parameter's saved tensors in. Raises ConfigError when they do not fit the plan."""
        views = self.views(first, count)
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
        workspace: Workspace,
        names: Sequence[str] | None = None,  # asks for diagnostics
    ) -> dict[str, dict[str, float]]:
        """One step of every layer in place. Returns the diagnostics by name, empty unless asked for."""
        shape = (self.layers, self.rows, self.cols)
        generators = [counter_generator(seed, self.device) for seed in hyper.seeds]
        generator = generators[0]  # also for codecs that draw
        h = self._compensate(grads, hyper, workspace)  # (layers, rows, cols) float32
        low = workspace.take("low", shape, torch.bfloat16).copy_(h) if self._halves(hyper) else h  # what is multiplied
        a = low if self.rows <= self.cols else low.mT  # (layers, m, n)

        old = self.basis.read()  # (layers, m, r)
        basis = self._track(a, old, hyper, generators).to(low.dtype)
        exact = matmul(basis.mT, a).float()  # (layers, r, n)
        u = exact if self.factor is None else self.factor.decode(self.factor.encode(exact, generator=generator))
        as_used = basis.float()
        adam = self._moments(u, rotation(as_used, old), hyper)
        found = diagnose(self, h, as_used, exact, u, old, grads, hyper, names) if names else {}
        self.basis.write(as_used)

        product = workspace.take("product", shape, low.dtype)
        residual = self.plan.residual and self.rank < self.small
        scale, along = None, adam
        if self.error.store is not None:
            h.sub_(self._product(basis, u, product))  # H - PU
            self.error.keep(h, generator=generator)
            if residual:
                scale = self._residual_scale(self._norms(h), u, adam)
        elif residual:  # nothing else needs H - PU: D = H s + P (A - U s), and the residual's norm by Pythagoras
            left = (self._norms(h).square() - column_norms(exact).square()).clamp_min(0.0).sqrt()
            scale = self._residual_scale(left, u, adam)
            along = adam.addcmul_(u, scale.unsqueeze(-2), value=-1.0)
        scale = None if scale is None else scale.mul_(-hyper.lr)
        self._apply(params, h, scale, self._product(basis, along.mul_(-hyper.lr), product), hyper, workspace)
        return found

    def _compensate(self, grads: Sequence[Tensor], hyper: Hyper, workspace: Workspace) -> Tensor:
        """H = G + E (layers, rows, cols) float32; the gradient itself where it needs neither error, nor sign, stacking or conversion."""
        shape = (self.layers, self.rows, self.cols)
        alone = self.layers == 1 and grads[0].dtype == torch.float32 and grads[0].is_contiguous()
        if self.error.store is None and alone and not hyper.maximize:
            return grads[0].view(shape)
        return self.error.compensate(grads, workspace.take("h", shape, torch.float32), -1.0 if hyper.maximize else 1.0)

    def _halves(self, hyper: Hyper) -> bool:
        """Whether products are taken in bfloat16."""
        if hyper.matmul == "auto":
            return self.rows * self.cols >= HALVES_PAY and bfloat16_units(self.device)
        return hyper.matmul == "bfloat16"

    def _track(self, a: Tensor, old: Tensor, hyper: Hyper, generators: Sequence[torch.Generator | None]) -> Tensor:
        """The new basis (layers, m, r) for H (layers, m, n), strongest column first; scouts replace the weakest directions of the start."""
        fresh = self.rank if hyper.step == 1 else self.scouts
        shape = (fresh, self.large) if self.plan.power == "half" else (self.small, fresh)
        scouts = torch.stack([torch.randn(shape, generator=generator, device=self.device) for generator in generators])
        if self.plan.power == "full":
            return power_step(old, a, scouts)[0]
        return half_step(a, scouts if fresh == self.rank else torch.cat([self.first.read()[:, : self.rank - fresh], scouts], dim=-2))

    def _product(self, basis: Tensor, factor: Tensor, out: Tensor) -> Tensor:
        """basis @ factor in the orientation of the parameters, (layers, rows, cols)."""
        factor = factor.to(basis.dtype)
        return matmul(basis, factor, out) if self.rows <= self.cols else matmul(factor.mT, basis.mT, out)

    def _norms(self, h: Tensor) -> Tensor:
        """Norms over the smaller dimension of h (layers, rows, cols), (layers, n)."""
        return torch.linalg.vector_norm(h, dim=-1) if self.rows > self.cols else column_norms(h)

    def _apply(
        self, params: Sequence[Tensor], h: Tensor, scale: Tensor | None, product: Tensor, hyper: Hyper, workspace: Workspace
    ) -> None:
        """W <- (1 - lr weight_decay) W + (H diag(scale) + product); ``scale`` and ``product`` hold the learning rate."""
        decay = 1.0 - hyper.lr * hyper.weight_decay
        ready = all(param.dtype == torch.float32 and param.is_contiguous() for param in params)
        if scale is not None and ready and native.ready(self.device):
            from mango.native import optim

            kind, shift = (torch.uint16, 16) if product.dtype == torch.bfloat16 else (torch.uint32, 0)
            for param, values, by, bits in zip(params, h, scale, product.view(kind), strict=True):
                weights = param.detach().view(self.rows, self.cols).numpy()
                arrays = (weights, values.numpy(), by.numpy(), self.rows > self.cols, bits.numpy(), shift, np.float32(decay))
                run(optim.apply, self.rows, self.cols, *arrays)
            return
        step = product
        if scale is not None:
            by_column = scale.unsqueeze(-2 if self.rows <= self.cols else -1)
            step = torch.mul(h, by_column, out=workspace.take("h", tuple(h.shape), torch.float32)).add_(product)
        if decay != 1.0:
            torch._foreach_mul_(list(params), decay)
        torch._foreach_add_(list(params), [d.view(param.shape).to(param.dtype) for d, param in zip(step.unbind(0), params, strict=True)])

    def _moments(self, u: Tensor, r: Tensor, hyper: Hyper) -> Tensor:
        """Adam's direction for the factor U (layers, r, n), with the moments carried to the new basis by r (layers, r, r).

        Row i of r has squared norm c <= 1: that much of the new direction lay in the old span, and the rest has no history. Left at zero,
        the missing second moment would blow the step up to (1 - beta1) / sqrt(1 - beta2) times its size, as bias correction knows only
        the age of the state. The rest is taken to have had the present factor all along, so that a wholly new direction (c = 0)
        steps as Adam's own first step does: its corrected moments are U and U².
        """
        beta1, beta2 = hyper.betas
        dtype = torch.bfloat16 if self._halves(hyper) else torch.float32
        moments = (self.first.read(), self.second_root.read().square_())
        m, v = (moment.float() for moment in rotate_moments(r.to(dtype), *(moment.to(dtype) for moment in moments)))
        new = (1.0 - r.square().sum(dim=-1, keepdim=True)).clamp_(0.0, 1.0)  # (layers, r, 1)
        # beta1 (m + new (1 - beta1^(t-1)) u) + (1 - beta1) u, and so for v
        m.mul_(beta1).addcmul_(new * (beta1 * (1.0 - beta1 ** (hyper.step - 1))) + (1.0 - beta1), u)
        v.mul_(beta2).addcmul_(new * (beta2 * (1.0 - beta2 ** (hyper.step - 1))) + (1.0 - beta2), u.square())
        root = v.sqrt_()
        self.first.write(m)
        self.second_root.write(root)
        unbias = 1.0 - beta1**hyper.step
        return m.div_(root.mul_(unbias / (1.0 - beta2**hyper.step) ** 0.5).add_(hyper.eps * unbias))

    def _residual_scale(self, left: Tensor, u: Tensor, adam: Tensor) -> Tensor:
        """Column scales (layers, n) of the residual H - PU whose column norms are ``left`` (layers, n): Fira's ‖A_j‖ / ‖U_j‖, bounded.

        Fira's ratio has no bound where a column of U happens to be small, and Fira then limits the growth of the whole
        residual from step to step. We bound each column instead: per dimension the residual is never stepped further than the captured
        part, ‖s_j (H - PU)_j‖ / sqrt(m - r) <= ‖A_j‖ / sqrt(r). That needs no state and does not depend on the scale of a column.
        """
        bound = torch.maximum(column_norms(u), (self.rank / (self.small - self.rank)) ** 0.5 * left)
        # a dead column (zero gradient, momentum left) must give a finite scale: infinity times its zero residual is not a number
        return column_norms(adam) / bound.clamp_min(1e-30)

    def certified(self, hyper: Hyper) -> float:
        """T3 and T4: the contraction that H -> P q(PᵀH) has for every H, in expectation over the scouts.

        0 when products are taken in bfloat16: rounding them errs by about 2^-9 ‖H‖, the order of the certificate itself.
        """
        if self._halves(hyper):
            return 0.0
        half = self.scouts / self.small if self.rank < self.small else 1.0
        basis = half if self.plan.power == "half" else scout_alpha(self.small, self.rank, self.scouts)
        return basis * (self.factor.alpha() if self.factor is not None else 1.0)
