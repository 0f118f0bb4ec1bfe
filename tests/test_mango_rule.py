"""Mango's update rule in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mango import LayerPlan, Mango
from mango.draws import counter_generator, gaussian
from mango.subspace import scout_alpha

EXACT = LayerPlan(basis_codec="fp32", moment_codec="fp32", error="gradient")


class Reference:
    """The update rule of one layer in float64, written out once more with QR instead of CholeskyQR and no codec."""

    def __init__(self, w: Tensor, plan: LayerPlan, lr: float, betas: tuple[float, float], eps: float, decay: float) -> None:
        self.w, self.plan, self.lr, self.betas, self.eps, self.decay = w.double(), plan, lr, betas, eps, decay
        self.error = torch.zeros_like(self.w)
        self.basis: Tensor | None = None
        self.means: tuple[Tensor, ...] = ()
        self.t = 0

    def step(self, grad: Tensor, seed: tuple[int, ...]) -> None:
        self.t += 1
        flip = self.w.shape[0] > self.w.shape[1]
        h = grad.double() + self.plan.error_decay * self.error
        h = h.T if flip else h
        m, n = h.shape
        rank = self.plan.columns(m, n)
        count = rank if self.t == 1 else (min(self.plan.scouts, rank) if rank < m else 0)
        half = self.plan.power == "half"
        fresh = torch.randn(*((count, n) if half else (m, count)), generator=counter_generator(seed)).double()
        old = torch.zeros(m, rank).double() if self.basis is None else self.basis
        seen, stays = h, torch.zeros(m, rank).double()
        if half:
            z = (fresh if self.basis is None else torch.cat([self.m[: rank - count], fresh])).T
        else:
            kept = old[:, : rank - count]
            for k in range(count):  # the scouts as they are projected, not as QR makes them of one another
                column = fresh[:, k] - kept @ (kept.T @ fresh[:, k])
                fresh[:, k] = column / column.norm()
            if self.plan.power == "sampled":
                part = int(torch.randint(4, (1,), generator=counter_generator(seed[:2])))
                seen = h[:, part::4] if flip else h[:, n * part // 4 : n * (part + 1) // 4]
                stays[:, : rank - count] = 3 * kept * (seen.T @ kept).norm(dim=0)
            z = seen.T @ torch.cat([kept, fresh], 1)
        z = z / z.norm(dim=0)
        scale = torch.where(stays.norm(dim=0) > 0, 4.0, 1.0)
        q, r = torch.linalg.qr((seen @ z + stays) / scale)
        q, diagonal = q * r.diagonal().sign(), r.diagonal().abs()
        p = q[:, diagonal.argsort(descending=True)]
        u = p.T @ h
        turn = p.T @ old
        if self.basis is None:
            self.m = self.v = torch.zeros_like(u)
        beta1, beta2 = self.betas
        new = (1 - turn.square().sum(1, keepdim=True)).clamp(0, 1)
        self.m = turn @ self.m + new * (1 - beta1 ** (self.t - 1)) * u
        self.v = turn.square() @ self.v + new * (1 - beta2 ** (self.t - 1)) * u.square()
        self.m = beta1 * self.m + (1 - beta1) * u
        self.v = beta2 * self.v + (1 - beta2) * u.square()
        adam = self.m / (1 - beta1**self.t) / ((self.v / (1 - beta2**self.t)).sqrt() + self.eps)
        left = h - p @ u
        direction = p @ adam
        if self.plan.residual and rank < m and self.plan.scaling == "column":
            direction = direction + self.by_column(left, u, adam)
        elif self.plan.residual and rank < m:
            along, down = left.square().mean(1), left.square().mean(0)
            if self.plan.error == "none":
                along, total = h.square().mean(1), h.square().mean(0)
                down = torch.maximum(down, total / 256)
                along = torch.maximum(along, along.mean() / 256) * down.mean() / total.mean()
            rows, cols = self.factored(along, down, adam)
            if self.plan.error == "none":
                direction = direction * rows[:, None] / rows.square().mean().sqrt()
            direction = direction + torch.outer(rows, cols) * left
        if self.plan.error != "none":
            self.error = left.T if flip else left
        direction = direction.T if flip else direction
        direction = direction * torch.where(direction * grad.double() > 0, 1 + self.plan.caution, 1 - self.plan.caution)
        self.w = (1 - self.lr * self.decay) * self.w - self.lr * direction
        self.basis = p

    def by_column(self, left: Tensor, u: Tensor, adam: Tensor) -> Tensor:
        floor = (len(u) / (len(left) - len(u))) ** 0.5 * left.norm(dim=0)
        return left * (adam.norm(dim=0) / torch.maximum(u.norm(dim=0), floor))

    def factored(self, along: Tensor, down: Tensor, adam: Tensor) -> tuple[Tensor, Tensor]:
        now, beta2, m, n = (along, down), self.betas[1], len(along), len(down)
        self.means = tuple(beta2 * mean + (1 - beta2) * seen for mean, seen in zip(self.means or (0, 0), now, strict=True))
        rows, cols = (torch.maximum(mean / (1 - beta2**self.t), seen) for mean, seen in zip(self.means, now, strict=True))
        middle = (rows.mean() * cols.mean()).sqrt()
        strength = (now[0] / rows).mean() * (now[1] / cols).mean() * middle / now[0].mean()
        bound = (adam.square().sum() / len(adam) * (m - len(adam)) / (m * n) / strength).sqrt().clamp(max=1.0)
        return bound * (middle / rows).sqrt(), cols.rsqrt()


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (72, 72), (64, 8, 3, 3)])
@pytest.mark.parametrize(
    "error, residual, scaling, scouts",
    [
        ("gradient", True, "factored", 1),
        ("none", True, "factored", 2),
        ("gradient", True, "column", 1),
        ("none", True, "column", 2),
        ("gradient", False, "factored", 0),
    ],
)
@pytest.mark.parametrize("power", ["full", "sampled", "half"])
def test_matches_the_update_rule_in_float64(
    shape: tuple[int, ...], error: str, residual: bool, scaling: str, scouts: int, power: str
) -> None:
    plan = replace(EXACT, rank=8, scouts=scouts, error=error, residual=residual, scaling=scaling, power=power)
    param = nn.Parameter(gaussian((*shape, 1), (0,))[..., 0])
    reference = Reference(param.detach().flatten(1), plan, 0.01, (0.9, 0.99), 1e-8, 0.1)
    optimizer = Mango([("w", param)], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, plan=plan, seed=5)
    steady = gaussian((*shape, 1), (1,))[..., 0].flatten(1)
    u, _, v = torch.linalg.svd(steady, full_matrices=False)
    steady = u @ torch.diag(1.3 ** -torch.arange(float(u.shape[1]))) @ v * 30  # separated directions: float32 finds the same basis
    for step in range(1, 7):
        grad = steady + 0.05 * gaussian((*shape, 1), (2, step))[..., 0].flatten(1)
        param.grad = grad.view(shape).clone()
        optimizer.step()
        reference.step(grad, (5, step, 0, 0))
        assert torch.allclose(param.detach().flatten(1).double(), reference.w, atol=2e-5), step


@pytest.mark.parametrize(
    "shape, rank, power",
    [
        ((512, 32), 4, "half"),
        ((32, 512), 4, "half"),
        ((511, 32), 4, "full"),
        ((64, 8, 3, 3), 4, "full"),
        ((128, 256), 32, "full"),
        ((128, 256), 33, "full"),
        ((512, 511), 8, "full"),
        ((512, 512), 64, "sampled"),
        ((512, 512), 65, "full"),
        ((512, 8192), 8, "half"),
    ],
)
def test_how_a_basis_moves_unless_told_otherwise(shape: tuple[int, ...], rank: int, power: str) -> None:
    weights = {}
    for asked in ("auto", "full", "sampled", "half"):
        param = nn.Parameter(gaussian((*shape, 1), (0,))[..., 0])
        optimizer = Mango([("w", param)], lr=0.01, plan=LayerPlan(rank=rank, power=asked))
        for step in range(2):
            param.grad = gaussian((*shape, 1), (1, step))[..., 0]
            optimizer.step()
        weights[asked] = param.detach()
    assert torch.equal(weights["auto"], weights[power])
    assert not torch.equal(weights["half"], weights["full"])
    assert torch.equal(weights["sampled"], weights["full"]) == (rank in (33, 65)), "a sample has two columns for each of the basis"


@pytest.mark.parametrize("shape", [(64, 130), (131, 64)])
def test_what_a_sample_leaves_out_is_seen_later(shape: tuple[int, int]) -> None:
    """A gradient in a single column, or row, that three of four samples miss."""
    gradient = torch.zeros(shape)
    (gradient[:, 100] if shape[1] > 64 else gradient[100]).copy_(gaussian((64, 1), (1,))[:, 0])
    energies = []
    for seed in range(40):
        param = nn.Parameter(torch.zeros(shape))
        optimizer = Mango([("w", param)], plan=LayerPlan(rank=4, power="sampled"), seed=seed)
        optimizer.observe()
        param.grad = gradient.clone()
        optimizer.step()
        found = optimizer.diagnostics()["w"]
        energies.append(found["energy"])
    seen = [energy for energy in energies if energy > 0.999]
    assert all(energy < 0.2 for energy in energies if energy not in seen) and 4 <= len(seen) <= 18
    assert found["certified"] == pytest.approx(scout_alpha(64, 4, 1) / 4) and sum(energies) / 40 >= found["certified"]


def test_the_default_plan_leaves_heads_of_classifiers_to_plain_adamw_and_others_are_obeyed() -> None:
    """Their few rows follow no normalisation, and Mango's long steps would follow the noise of their batches."""
    shapes = {
        "head": (10, 512),
        "head as convolution": (10, 512, 1, 1),
        "wide": (64, 512),
        "embedding": (512, 10),
        "convolution": (32, 64, 3, 3),
    }
    named = [(name, nn.Parameter(gaussian(shape, (index,)))) for index, (name, shape) in enumerate(shapes.items())]
    for plan, left in ((LayerPlan(), {"head", "head as convolution"}), (LayerPlan(rank=0.25), set()), (None, set(shapes))):
        optimizer = Mango(named, lr=0.01, plan=plan)
        assert {name for name, found in optimizer.plans().items() if found is None} == left
        assert {name for name, found in optimizer.own_plans().items() if found is None} == left
    optimizer, other = (Mango(named, lr=0.01) for _ in range(2))
    optimizer.set_plan("head", LayerPlan())  # whoever asks for it by name has it, also after loading
    for _, param in named:
        param.grad = gaussian(param.shape, (9,))
    optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    assert optimizer.plans()["head"] == other.plans()["head"] == LayerPlan()
    assert other.nbytes() == optimizer.nbytes()
    budgeted = Mango(named, lr=0.01, memory_budget="8 bytes/param")
    assert budgeted.plans()["head"] is None and budgeted.nbytes() <= 8 * sum(param.numel() for _, param in named)
