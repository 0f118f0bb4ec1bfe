"""MoleOptimizer: steps on the factors that converted layers leave, never on a matrix of the gradient's size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mango.errors import ConfigError, NonFinite
from mango.mole.factors import Factors, take
from mango.optim.adamw import step_group
from mango.optim.base import KeepsTypes, loss_of
from mango.optim.guard import Guard
from mango.products import without_autocast
from mango.subspace import rotation

SCALINGS = ("adam", "eigen", "whiten", "muon")
MUON_RMS = 0.2  # of Muon's step, as large as AdamW's usually is (arXiv:2502.16982)


class MoleOptimizer(KeepsTypes):
    r"""A step along P A for a gradient that is there as factors P U, with moments of size (k, n).

    .. math::
        R &= P^\top P' && \text{carries moments to the new basis, } M \leftarrow \beta_1 R M + (1-\beta_1) U \\
        \text{adam}: A &= \hat M / (\sqrt{\hat V} + \epsilon), && V \leftarrow \beta_2 (R \circ R) V + (1-\beta_2) U \circ U \\
        \text{eigen}: A_i &= \hat M_i / (\sqrt{\hat\lambda_i} + \epsilon), && \lambda_i \text{ the same for the mean square of row } i \\
        \text{whiten}: A &= L^{-1} \hat M, && L L^\top = \hat C, \; C \leftarrow \beta_2 R C R^\top + (1-\beta_2) U U^\top / n \\
        \text{muon}: A &= (M M^\top)^{-1/2} M, && \text{the polar factor, from a } k \times k \text{ matrix alone} \\
        W &\leftarrow (1 - \eta\lambda) W - \eta P A

    Directions that are new to the basis have no history and are taken to have had the present factor all along, as in mango.Mango.
    Parameters with a gradient of their own are stepped by AdamW. Factors are consumed by the step. The (k, k) problems of "whiten" and
    "muon" are solved in one call for all layers of a group that have the same k.
    A state may be loaded under another rank than it was saved with: its moments are carried to the present basis.

    Args:
        params: parameters, (name, parameter) pairs, or groups of either.
        lr: learning rate, finite and >= 0.
        betas: decay rates of the first and second moment, in [0, 1).
        eps: >= 0.
        weight_decay: decoupled, >= 0.
        scaling: "adam", "eigen", "whiten" or "muon".

    Raises:
        ConfigError: for an option that is not legal. NonFinite: for factors or gradients that are not finite, before anything has changed.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        scaling: str = "adam",
    ) -> None:
        self._guard = Guard()
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "scaling": scaling})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "eps", "weight_decay"):
            if not 0.0 <= float(group[name]) < float("inf"):
                raise ConfigError.of(name, group[name], "a finite number >= 0")
        if len(group["betas"]) != 2 or not all(0.0 <= beta < 1.0 for beta in group["betas"]):
            raise ConfigError.of("betas", group["betas"], "two numbers in [0, 1)")
        if group["scaling"] not in SCALINGS:
            raise ConfigError.of("scaling", group["scaling"], "one of " + ", ".join(SCALINGS))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._guard = Guard()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for param in group["params"]:
                take(param)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Returns the closure's loss, if there is a closure."""
        loss = loss_of(closure)
        work = []
        for group in self.param_groups:
            names = group.get("param_names") or [f"a parameter of shape {tuple(param.shape)}" for param in group["params"]]
            dense = [(param, name) for param, name in zip(group["params"], names, strict=True) if param.grad is not None]
            factored = [(param, factors, name) for param, name in zip(group["params"], names, strict=True) if (factors := take(param))]
            for _, factors, name in factored:
                if not bool(factors.basis.isfinite().all() & factors.coefficients.isfinite().all()):
                    raise NonFinite(f"the factors of the gradient of {name} hold NaN or infinity")
            grads = self._guard.admit([param.grad.detach() for param, _ in dense if param.grad is not None], [name for _, name in dense])
            work.append((group, [param for param, _ in dense], grads, factored))
        for group, params, grads, factored in work:
            step_group(group, params, grads, self.state)
            if factored:
                with without_autocast(factored[0][0]):
                    self._step_factored(group, [(param, factors) for param, factors, _ in factored])
        return loss

    def _step_factored(self, group: dict[str, Any], factored: Sequence[tuple[Tensor, Factors]]) -> None:
        for param, factors in factored:
            self._track(group, self.state[param], factors)
        roots = self._roots(group, [self.state[param] for param, _ in factored])
        for (param, factors), root in zip(factored, roots, strict=True):
            self._apply(group, param, factors, root)

    @staticmethod
    def _track(group: dict[str, Any], state: dict[str, Any], factors: Factors) -> None:
        """Move the moments of one parameter."""
        (beta1, beta2), u = group["betas"], factors.coefficients  # (k, n)
        scaling = group["scaling"]
        step = state["step"] = state.get("step", 0) + 1
        second = {
            "adam": u.square,
            "eigen": lambda: u.square().mean(1),
            "whiten": lambda: u @ u.mT / u.shape[1],
            "muon": u.new_empty(0).clone,
        }
        now = second[scaling]()
        if step == 1:
            m, v = (1.0 - beta1) * u, (1.0 - beta2) * now
        else:
            r = rotation(factors.basis, state["basis"])  # (k, k'): the rank may have changed
            new = (1.0 - r.square().sum(1)).clamp(0.0, 1.0)  # (k,) share of each direction without a history
            catch1, catch2 = beta1 * (1.0 - beta1 ** (step - 1)), beta2 * (1.0 - beta2 ** (step - 1))
            m = beta1 * (r @ state["first"]) + u * (new * catch1 + 1.0 - beta1).unsqueeze(1)
            if scaling == "whiten":
                v = beta2 * (r @ state["second"] @ r.mT) + (1.0 - beta2) * now + torch.diag(new * catch2 * now.diagonal())
            elif scaling == "muon":
                v = now
            else:
                fresh = (new * catch2 + 1.0 - beta2).view(-1, *(1,) * (now.ndim - 1))
                v = beta2 * (r.square() @ state["second"]) + now * fresh
        state.update(basis=factors.basis, first=m, second=v)

    @staticmethod
    def _roots(group: dict[str, Any], states: Sequence[dict[str, Any]]) -> list[Tensor | None]:
        """For each parameter the (k, k) matrix of its scaling: L of "whiten", (M Mᵀ)^(-1/2) of "muon", None of the others."""
        if group["scaling"] == "whiten":
            covariances = [state["second"] / (1.0 - group["betas"][1] ** state["step"]) for state in states]
            return _batched(partial(_cholesky, eps=group["eps"]), covariances)
        if group["scaling"] == "muon":
            return _batched(_inverse_root, [state["first"] @ state["first"].mT for state in states])
        return [None] * len(states)

    def _apply(self, group: dict[str, Any], param: Tensor, factors: Factors, root: Tensor | None) -> None:
        """Step one parameter along P A, by its moments."""
        direction, lr = self._direction(group, self.state[param], root, param), float(group["lr"])
        update = factors.basis @ direction  # (small, n)
        if factors.extra is not None:  # an unbiased rest has no moments: it is scaled as the factors were
            update.addmm_(*factors.extra, alpha=float(direction.norm() / factors.coefficients.norm().clamp_min(1e-30)))
        if group["weight_decay"]:
            param.mul_(1.0 - lr * group["weight_decay"])
        param.add_((update.mT if factors.columns else update).to(param.dtype), alpha=-lr)

    @staticmethod
    def _direction(group: dict[str, Any], state: dict[str, Any], root: Tensor | None, param: Tensor) -> Tensor:
        """A (k, n)."""
        m, scaling = state["first"], group["scaling"]
        if root is not None and scaling == "muon":  # the polar factor does not depend on the size of M
            return root @ m * (MUON_RMS * (param.numel() / len(m)) ** 0.5)
        m = m / (1.0 - group["betas"][0] ** state["step"])
        if root is not None:
            return torch.linalg.solve_triangular(root, m, upper=False)
        deviation = (state["second"] / (1.0 - group["betas"][1] ** state["step"])).sqrt() + group["eps"]
        return m / (deviation if scaling == "adam" else deviation.unsqueeze(1))

    def nbytes(self) -> int:
        """Bytes of every tensor kept between steps."""
        return sum(value.nbytes for state in self.state.values() for value in state.values() if isinstance(value, Tensor))


def _batched(solve: Callable[[Tensor], Tensor], matrices: Sequence[Tensor]) -> list[Tensor | None]:
    """solve(matrix) of each, in one call for those of one shape. It saves launches on an accelerator; a CPU takes the same time."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for place, matrix in enumerate(matrices):
        groups.setdefault((matrix.shape, matrix.device, matrix.dtype), []).append(place)
    found: list[Tensor | None] = [None] * len(matrices)
    for places in groups.values():
        for place, solved in zip(places, solve(torch.stack([matrices[place] for place in places])), strict=True):
            found[place] = solved
    return found


def _cholesky(c: Tensor, eps: float) -> Tensor:
    """L (layers, k, k) with L Lᵀ = C + floor: relative to the largest direction, it keeps L defined when directions die out."""
    floor = eps**2 + 1e-6 * c.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(torch.finfo(c.dtype).tiny)  # (layers,)
    return torch.linalg.cholesky(c + floor[:, None, None] * torch.eye(c.shape[-1], dtype=c.dtype, device=c.device))


def _inverse_root(gram: Tensor) -> Tensor:
    """gram^(-1/2) (layers, k, k) on the span of the directions that are there."""
    values, vectors = torch.linalg.eigh(gram)
    least = 1e-10 * values[:, -1:].clamp_min(torch.finfo(values.dtype).tiny)
    inverse = torch.where(values > least, values, torch.inf).rsqrt()
    return (vectors * inverse.unsqueeze(1)) @ vectors.mT
