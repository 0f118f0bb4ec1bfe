"""AdaRankGrad (arXiv:2410.17881): Adam in a subspace whose rank falls as the gradients' does. Written from the paper.

Every ``update_proj_gap`` steps the range of the gradient is sketched (randomised SVD), and the rank becomes the least one that holds a
share ``information`` of the squared norm, never above the largest; the moments are carried to the new basis. The paper also refreshes when
the projected gradient has become small, a condition on full gradients; we refresh at fixed steps alone, as GaLore does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mango.draws import gaussian
from mango.errors import ConfigError
from mango.optim.base import KeepsTypes, loss_of
from mango.orthonormal import orthonormalize


class AdaRankGrad(KeepsTypes):
    r"""Q = basis, R = QᵀQ', M = β1 R M + (1-β1) QᵀG, V = β2 |R² (V - M²) + (R M)²| + (1-β2) (QᵀG)², W -= lr (scale Q M̂/(√V̂+ε) + λ W).

    Args:
        params: matrices in groups that may set ``rank`` (largest rank, an integer; absent = plain AdamW for every tensor of the group).
        lr, betas, eps, weight_decay: as AdamW.
        information: least share of ‖G‖² that the basis captures when it is chosen, in (0, 1].
        update_proj_gap: steps between two choices, at least 1.
        scale: of the update that returns from the subspace, GaLore's.
        seed: of the sketches.

    Raises:
        ConfigError: for an option that is not legal.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        information: float = 0.9,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        seed: int = 0,
    ) -> None:
        if not 0.0 < information <= 1.0:
            raise ConfigError.of("information", information, "a share in (0, 1]")
        if isinstance(update_proj_gap, bool) or not isinstance(update_proj_gap, int) or update_proj_gap < 1:
            raise ConfigError.of("update_proj_gap", update_proj_gap, "an integer >= 1")
        if not lr >= 0.0:
            raise ConfigError.of("lr", lr, "a number >= 0")
        self.seed = seed
        options = {"information": information, "update_proj_gap": update_proj_gap, "scale": scale}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **options})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Returns the closure's loss, if there is a closure."""
        loss = loss_of(closure)
        for place, group in enumerate(self.param_groups):
            for number, param in enumerate(group["params"]):
                if param.grad is not None:
                    self._step(param, param.grad, group, (self.seed, place, number))
        return loss

    def _step(self, param: Tensor, grad: Tensor, group: dict[str, Any], seed: tuple[int, ...]) -> None:
        state, (beta1, beta2) = self.state[param], group["betas"]
        state["step"] = state.get("step", 0) + 1
        flip = param.shape[0] > param[0].numel() if param.ndim > 1 else False
        g = grad.float()
        if "rank" in group:
            g = g.mT if flip else g  # (m, n), m <= n
            if (state["step"] - 1) % group["update_proj_gap"] == 0:
                self._choose(state, g, group, (*seed, state["step"]))
            g = state["basis"].mT @ g  # (r, n)
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(g), torch.zeros_like(g)
        m, v = state["exp_avg"], state["exp_avg_sq"]
        m.lerp_(g, 1.0 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
        step = (m / (1.0 - beta1 ** state["step"])) / ((v / (1.0 - beta2 ** state["step"])).sqrt() + group["eps"])
        if "rank" in group:
            step = group["scale"] * (state["basis"] @ step)
            step = step.mT if flip else step
        param.mul_(1.0 - group["lr"] * group["weight_decay"])
        param.add_(step.to(param.dtype), alpha=-group["lr"])

    @staticmethod
    def _choose(state: dict[str, Any], g: Tensor, group: dict[str, Any], seed: tuple[int, ...]) -> None:
        """A new basis by randomised SVD (arXiv:0909.4061, one power iteration), its rank by information, the moments carried over."""
        columns = min(group["rank"], g.shape[0])
        sketch = g @ gaussian((g.shape[1], min(columns + 8, g.shape[0])), seed, g.device)
        sketch = g @ (g.mT @ orthonormalize(sketch))
        q = orthonormalize(sketch)
        u, s, _ = torch.linalg.svd(q.mT @ g, full_matrices=False)
        held, total = s[:columns].square().cumsum(0), g.square().sum()
        rank = min(columns, int((held < group["information"] * total).sum()) + 1)
        basis = (q @ u[:, :rank]).contiguous()
        if "basis" in state:
            turn = basis.mT @ state["basis"]
            mean = turn @ state["exp_avg"]
            spread = turn.square() @ (state["exp_avg_sq"] - state["exp_avg"].square())
            state["exp_avg"], state["exp_avg_sq"] = mean, (spread + mean.square()).abs_()
        state["basis"] = basis
