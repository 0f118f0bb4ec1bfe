"""The compressed state and the step of a stack of same-shaped layers: a handful of batched products, no loop over layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from mango import codecs, native
from mango.codecs.base import all_finite
from mango.draws import counter_generator
from mango.errors import ConfigError, NonFinite
from mango.feedback.buffer import ErrorBuffer
from mango.native.threads import run
from mango.optim.diagnose import diagnose
from mango.optim.moments import Moments
from mango.optim.plan import PARTS, LayerPlan
from mango.optim.residual import Residual
from mango.products import ByteMatrices, Lift, Part, in_bytes, in_halves, matmul, square_sums, subtract
from mango.stacked import Stacked
from mango.subspace import Matrix, half_step, power_step, rotation, scout_alpha
from mango.workspace import Workspace

STACK_VALUES = 1 << 22  # values of one batched product: 16 MiB of float32 workspace, however many layers share a shape


def plain(tensor: Tensor) -> bool:
    """Whether a parameter or gradient is a float32 matrix as it lies, for a compiled loop."""
    return tensor.dtype == torch.float32 and tensor.is_contiguous()


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
    matmul: str  # "float32", "bfloat16", "int8", or "auto" (see mango.Mango)


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
        self.power = plan.moves(rows, cols)
        self.basis = Stacked(plan.basis_codec, layers, (self.small, self.rank), device)
        self.moments = Moments(plan.moment_codec, layers, self.rank, self.large, device)
        stepped = plan.residual and self.rank < self.small
        self.residual = Residual(plan.scaling, layers, (rows, cols), self.rank, device) if stepped else None
        self.error = ErrorBuffer(plan.error, plan.error_codec, layers, (rows, cols), device)
        self.factor = codecs.get(plan.factor_codec) if plan.factor_codec else None

    def extras(self) -> dict[str, Stacked]:
        """What the plan asks to keep beside the basis and the moments."""
        found = {} if self.residual is None else {f"residual_{name}": mean for name, mean in self.residual.means.items()}
        return found if self.error.store is None else {**found, "error": self.error.store}

    def parts(self) -> dict[str, Tensor]:
        """Every stored tensor as "quantity.part", views (layers, …)."""
        stores = {"basis": self.basis, "exp_avg": self.moments.first, "exp_avg_sq_root": self.moments.root, **self.extras()}
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
        generators = [counter_generator(seed, self.device) for seed in hyper.seeds]
        generator = generators[0]  # also for codecs that draw
        signs = self._signs(grads, workspace)
        h = self._compensate(grads, signs, hyper, workspace)
        dtype = torch.bfloat16 if self._halves(hyper) else torch.float32  # of the factors
        a, sums_of_h = self._operand(h, dtype, hyper, workspace)  # (layers, m, n)

        old, mean = self.basis.read(), self.moments.read_first(dtype, workspace)  # (layers, m, r), (layers, r, n)
        basis = self._track(a, old, mean, hyper, generators).to(dtype)
        exact = self._project(basis, a, workspace)  # (layers, r, n)
        u = exact if self.factor is None else self.factor.decode(self.factor.encode(exact, generator=generator))
        as_used = basis.float()
        adam = self.moments.step(u, rotation(basis, old).float(), mean, hyper, workspace)
        found = diagnose(self, torch.stack(list(h)).float(), as_used, exact, u, old, grads, hyper, names) if names else {}
        self.basis.write(as_used)

        residual, scale = self.residual, None
        turned, integers = self.rows > self.cols, self._lifts_in_bytes(hyper)
        if self.error.store is not None:
            lift = Lift(basis, turned, integers, workspace)
            sums = self._keep(cast(Tensor, h), lift.products(u, not native.ready(self.device)), generator)
            lift = lift.times(-hyper.lr)
            scale = None if residual is None else residual.formed(sums, u, adam, hyper)
        else:
            lifted = as_used * -hyper.lr
            if residual is not None:  # D = diag(a) (H diag(s) + P (A - U diag(s))): F is not formed, and one product lifts both parts
                a, s = residual.unformed(sums_of_h if sums_of_h is not None else square_sums(h), exact, u, adam, hyper)
                adam.addcmul_(u, s.unsqueeze(-2), value=-1.0)
                lifted.mul_(a.unsqueeze(-1))
                scale = residual.sides((a, s))
            lift = Lift(lifted.to(dtype), turned, integers, workspace)
        scale = None if scale is None else (scale[0] * -hyper.lr, scale[1])
        if scale is not None and native.ready(self.device) and all(map(plain, (*params, *grads))):
            self._apply_compiled(params, grads if signs is None else signs, h, scale, lift.products(adam, whole=False), hyper)
        else:
            ((_, _, product),) = lift.products(adam, whole=True)
            self._apply(params, grads, h, scale, product.floats(), hyper, workspace)
        return found

    def _keep(self, h: Tensor, products: Iterable[Part], generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """H <- H - PU (layers, rows, cols), which is also kept. Returns ``square_sums`` of it."""
        coded = self.error.coded()
        sums = subtract(h, products, coded)
        if coded is None:
            self.error.keep(h, generator=generator)
        elif not all_finite(coded.scales.view(-1)):
            raise NonFinite("the error holds NaN, infinity or a value beyond float32")
        return sums

    def _compensate(self, grads: Sequence[Tensor], signs: Tensor | None, hyper: Hyper, workspace: Workspace) -> Tensor | Sequence[Tensor]:
        """H = G + b E (layers, rows, cols); the gradients themselves where they need neither error, nor sign or conversion.

        In float32; but in bfloat16 where it is multiplied so and what is kept of it is coarser by far, of four bits. signs: where those of
        the gradients are noted.
        """
        shape, usual = (self.layers, self.rows, self.cols), all(map(plain, grads))
        if self.error.store is None and not hyper.maximize and usual:
            if self.layers == 1:
                return grads[0].view(shape)
            if (self._bytes(hyper) or self._halves(hyper)) and native.ready(self.device):  # which are converted one at a time
                return [grad.view(self.rows, self.cols) for grad in grads]
        rough = usual and self._halves(hyper) and not self._bytes(hyper) and self.error.coded() is not None
        h = workspace.take("h", shape, torch.bfloat16 if rough else torch.float32)
        return self.error.compensate(grads, h, -1.0 if hyper.maximize else 1.0, self.plan.error_decay, signs)

    def _signs(self, grads: Sequence[Tensor], workspace: Workspace) -> Tensor | None:
        """(layers, rows, cols / 8) for the signs of the gradients, two bits a value, where they are noted while H is formed: to read all of
        the gradients once more, for the last line of the step, takes longer."""
        if self.residual is None or not (self.error.notes_signs() and all(map(plain, grads))):
            return None
        return workspace.take("signs", (self.layers, self.rows, self.cols // 8), torch.int16)

    def _halves(self, hyper: Hyper) -> bool:
        return in_halves((self.rows, self.cols), self.device, hyper.matmul)

    def _bytes(self, hyper: Hyper) -> bool:
        """Whether products with H are taken in int8. Not unless asked for: where a few directions hold nearly all of H, a scale for a row
        of H drowns the weak ones, which Adam steps as far as the strong. Wide models lose as much where only the basis is so tracked."""
        return hyper.matmul == "int8" and self._lifts_in_bytes(hyper)

    def _lifts_in_bytes(self, hyper: Hyper) -> bool:
        return in_bytes((self.rows, self.cols), self.rank, self.device, hyper.matmul)

    def _operand(
        self, h: Tensor | Sequence[Tensor], dtype: torch.dtype, hyper: Hyper, workspace: Workspace
    ) -> tuple[Matrix, tuple[Tensor, Tensor] | None]:
        """H (layers, rows, cols) as it is multiplied, A (layers, m, n); and ``square_sums(h)`` where they are needed and cost nothing."""
        turned, summed = self.rows > self.cols, self.residual is not None and self.error.store is None
        if self._bytes(hyper):
            a = ByteMatrices(h, turned, workspace, summed)
            return a, a.sums
        sums, low = None, h
        if h[0].dtype != dtype:
            low = workspace.take("low", (self.layers, self.rows, self.cols), dtype)
            if summed and native.ready(self.device):
                sums = square_sums(h, left=low)
            elif isinstance(h, Tensor):
                low.copy_(h)
            else:
                torch._foreach_copy_(list(low), list(h))
        low = cast(Tensor, low)
        return low.mT if turned else low, sums

    def _project(self, basis: Tensor, a: Matrix, workspace: Workspace) -> Tensor:
        """PᵀA (layers, r, n) float32."""
        if isinstance(a, ByteMatrices):
            return a.left(basis.mT.float())
        shape = (self.layers, self.rank, self.large)
        found = matmul(basis.mT, a, workspace.take("projected", shape, basis.dtype))
        return found if found.dtype == torch.float32 else workspace.take("exact", shape).copy_(found)

    def _track(self, a: Matrix, old: Tensor, mean: Tensor, hyper: Hyper, generators: Sequence[torch.Generator | None]) -> Tensor:
        """The new basis (layers, m, r) for H (layers, m, n), strongest column first; scouts replace the weakest directions of the start.

        That is the basis before, or with half a step the first moment in it, ``mean`` (layers, r, n).
        """
        fresh, half = self.rank if hyper.step == 1 else self.scouts, self.power == "half"
        shape = (fresh, self.large) if half else (self.small, fresh)
        scouts = torch.stack([torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32) for generator in generators])
        if half:
            return half_step(a, scouts if fresh == self.rank else torch.cat([mean[:, : self.rank - fresh], scouts], dim=-2))
        if self.power == "sampled":
            return power_step(old, a[..., self._sample(hyper)], scouts, damping=PARTS - 1.0)[0]
        return power_step(old, a, scouts)[0]

    def _sample(self, hyper: Hyper) -> slice:
        """A quarter of the n columns of H: each is in it with a probability of 1/4, whatever H is and the other counters were.

        Every fourth row of a tall matrix, whose rows may be heads or parts of a fused projection one after another, and columns side by
        side of a wide one: both are multiplied where they lie. One draw serves all layers of a step, however they are stacked.
        """
        generator = counter_generator(hyper.seeds[0][:2])
        part = int(torch.randint(PARTS, (1,), generator=generator, device="cpu"))  # on the host, which needs the answer
        if self.rows > self.cols:
            return slice(part, None, PARTS)
        return slice(self.large * part // PARTS, self.large * (part + 1) // PARTS)

    def _apply(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        left: Tensor | Sequence[Tensor],
        scale: tuple[Tensor, Tensor] | None,
        step: Tensor,
        hyper: Hyper,
        workspace: Workspace,
    ) -> None:
        """W <- (1 - lr weight_decay) W + X (1 + caution down G, else 1 - caution), X = step + diag(scale[0]) left diag(scale[1]).

        left: (layers, rows, cols) float32 or bfloat16; scale: (layers, rows) and (layers, cols), or None for zeros; step: (layers, rows,
        cols), overwritten. Up G to ascend.
        """
        decay, caution, sign = 1.0 - hyper.lr * hyper.weight_decay, self.plan.caution, -1.0 if hyper.maximize else 1.0
        change = step
        if scale is not None:
            left = left if isinstance(left, Tensor) else torch.stack(list(left))
            scaled = torch.mul(left, scale[0].unsqueeze(-1), out=workspace.take("scaled", tuple(left.shape)))
            change = scaled.mul_(scale[1].unsqueeze(-2)).add_(step)
        if caution:
            slope = workspace.take("h", tuple(change.shape))  # H is no longer needed
            torch._foreach_copy_([row.view(grad.shape) for row, grad in zip(slope.unbind(0), grads, strict=True)], list(grads))
            agrees = torch.eq(slope.sign_().mul_(change.sign()), -sign, out=slope)  # 1 or 0
            change.mul_(agrees.mul_(2.0 * caution).add_(1.0 - caution))
        if decay != 1.0:
            torch._foreach_mul_(list(params), decay)
        torch._foreach_add_(list(params), [d.view(param.shape).to(param.dtype) for d, param in zip(change.unbind(0), params, strict=True)])

    def _apply_compiled(
        self,
        params: Sequence[Tensor],
        slopes: Tensor | Sequence[Tensor],
        left: Tensor | Sequence[Tensor],
        scale: tuple[Tensor, Tensor],
        products: Iterable[Part],
        hyper: Hyper,
    ) -> None:
        """``_apply`` by a compiled loop, in the bands in which the products come. slopes: gradients, or their signs if they were noted."""
        from mango.native import optim

        caution, shape = self.plan.caution, (self.rows, self.cols)
        numbers = -1.0 if hyper.maximize else 1.0, 1.0 - hyper.lr * hyper.weight_decay, 1.0 + caution, 1.0 - caution
        weights = [param.detach().view(shape) for param in params]
        slopes = slopes if isinstance(slopes, Tensor) else [grad.detach().view(shape) for grad in slopes]
        for layer, rows, product in products:
            assert isinstance(layer, int)
            read = native.float_bits(left[layer][rows]), *product.read(), scale[0][layer, rows], scale[1][layer], slopes[layer][rows]
            run(optim.apply, rows.stop - rows.start, self.cols, weights[layer][rows], *read, *numbers)

    def certified(self, hyper: Hyper) -> float:
        """``contraction``, or 0 when products are taken in bfloat16 or int8: rounding them errs by 2^-9 ‖H‖ and more, its own order."""
        return 0.0 if self._halves(hyper) or self._lifts_in_bytes(hyper) else self.contraction()

    def contraction(self) -> float:
        """T3 and T4: that which H -> P q(PᵀH) has for every H, in expectation over scouts and samples, with float32 products."""
        basis = scout_alpha(self.small, self.rank, self.scouts)
        if self.rank < self.small and self.power != "full":
            basis = self.scouts / self.small if self.power == "half" else basis / PARTS
        return basis * (self.factor.alpha() if self.factor is not None else 1.0)
