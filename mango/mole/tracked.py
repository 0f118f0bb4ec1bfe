"""The tracked basis of one layer's gradient, moved by power steps on inputs and output gradients: the gradient is never formed.

Each layer takes its step in the backward pass, while its operands are there: to solve the small problems of several layers in one call, as
MoleOptimizer does, inputs and output gradients of all of them would have to be kept until then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mango.draws import gaussian
from mango.mole.config import columns
from mango.mole.factors import Factors
from mango.orthonormal import orthonormalize
from mango.subspace import estimate_energy, power_step

if TYPE_CHECKING:
    from mango.mole.layer import Layer

Pairs = Sequence[tuple[Tensor, Tensor]]  # (tokens, small), (tokens, large): G = Σ leftᵀ right, (small, large)


class Products:
    """Products with a gradient that is held as pairs of matrices, and with the factors that are carried to it.

    Args:
        pairs: G = Σ leftᵀ right.
        carried: None, or (basis, coefficients) to be added to G.
    """

    def __init__(self, pairs: Pairs, carried: tuple[Tensor, Tensor] | None = None) -> None:
        self.pairs, self.carried = pairs, carried

    def right(self, x: Tensor) -> Tensor:
        """Gᵀ x for x (small, k), (large, k) float32."""
        total = sum(
            (right.mT @ (left @ x.to(left.dtype)) for left, right in self.pairs), torch.zeros((), device=x.device, dtype=torch.float32)
        ).float()
        return total if self.carried is None else total + self.carried[1].mT @ (self.carried[0].mT @ x)

    def left(self, z: Tensor) -> Tensor:
        """G z for z (large, k), (small, k) float32."""
        total = sum(
            (left.mT @ (right @ z.to(right.dtype)) for left, right in self.pairs), torch.zeros((), device=z.device, dtype=torch.float32)
        ).float()
        return total if self.carried is None else total + self.carried[0] @ (self.carried[1] @ z)

    def gram(self, x: Tensor) -> Tensor:
        """G Gᵀ x."""
        return self.left(self.right(x))


class Tracked:
    """The basis of a layer's gradient on the smaller side of its weight, from step to step.

    Args:
        layer: whose gradient it follows.

    Attributes:
        basis: (small, k), k = rank plus the directions that are carried; None before the first step.
        previous: the basis before the last step.
        energy: (k,) the running energy along each column.
        carried: None, or the leading part of what the last step left out, as (basis, coefficients).
    """

    def __init__(self, layer: Layer) -> None:
        config, (outputs, inputs) = layer.config, layer.shape
        self.layer, self.columns = layer, inputs < outputs
        self.small, self.large = min(outputs, inputs), max(outputs, inputs)
        self.rank = config.columns(self.small)
        extra = columns(config.residual_rank, self.small) if config.residual == "carried" else 0
        self.total = min(self.rank + extra, self.small)
        self.basis: Tensor | None = None
        self.previous: Tensor | None = None
        self.energy: Tensor | None = None
        self.carried: tuple[Tensor, Tensor] | None = None

    def draw(self, shape: tuple[int, int], purpose: int, device: torch.device) -> Tensor:
        """Gaussian values that depend on the seed, the layer and the step alone."""
        return gaussian(shape, (self.layer.config.seed, self.layer.number, self.layer.steps, purpose), device)

    def reseed(self) -> None:
        """Forget the basis: the next step draws one."""
        self.basis = self.previous = self.energy = self.carried = None

    def step(self, pairs: Pairs) -> tuple[Factors, Products]:
        """Move the basis and take the factors. Also returns the products with the gradient, for who looks on."""
        config, device = self.layer.config, pairs[0][0].device
        g = Products(pairs, self.carried)
        self._move(g)
        assert self.basis is not None
        coefficients = g.right(self.basis).mT  # (k, large)
        order = coefficients.square().sum(1).argsort(descending=True, stable=True)
        basis, coefficients = self.basis[:, order], coefficients[order]
        if config.residual == "carried":
            self.carried = (basis[:, self.rank :], coefficients[self.rank :])
            basis, coefficients = basis[:, : self.rank], coefficients[: self.rank]
        share = None
        if config.trust_scaling or config.energy_target is not None:
            probes = self.draw((self.small, config.probes), 2, device)
            share = estimate_energy(basis, g.gram, probes)[0].clamp_min(1e-12)
        if config.energy_target is not None and share is not None:
            cumulative = coefficients.square().sum(1).cumsum(0)
            wanted = config.energy_target * cumulative[-1] / share  # of the whole gradient's energy
            keep = int((cumulative < wanted).sum()) + 1
            basis, coefficients = basis[:, :keep], coefficients[:keep]
        extra = None
        if config.residual == "unbiased" and basis.shape[1] < self.small:
            rest = self.small - basis.shape[1]
            s = min(columns(config.residual_rank, self.small), rest)
            drawn = self.draw((self.small, s), 3, device)
            directions = orthonormalize(drawn - basis @ (basis.mT @ drawn))  # (small, s) Haar beside P: there E[Ω Ωᵀ] = s / rest
            extra = (directions * (rest / s), g.right(directions).mT)
        if config.trust_scaling and share is not None:
            coefficients = coefficients / share.sqrt()
        return Factors(basis, coefficients, self.columns, extra), g

    def _move(self, g: Products) -> None:
        config, device = self.layer.config, g.pairs[0][0].device
        fresh = self.basis is None or self.energy is None
        start = self.basis if self.basis is not None else self.draw((self.small, self.total), 0, device)
        self.previous = self.basis
        if self.total == self.small and not fresh:
            return  # the basis is the whole space already
        decay, held, energy = (0.0, start, None) if fresh else (config.warm_start_decay, start, self.energy)

        def operator(x: Tensor) -> Tensor:
            y = g.gram(x)
            if energy is None or not decay:
                return y
            return y.mul_(1.0 - decay).add_(held @ (energy.unsqueeze(1) * (held.mT @ x)), alpha=decay)

        basis = orthonormalize(start) if fresh else start
        scouts = self.draw((self.small, min(config.scouts, self.total)), 1, device) if config.scouts else None
        for number in range(config.power_iters):
            basis, found = power_step(basis, operator, scouts if number == 0 else None)
        self.basis = torch.linalg.qr(basis)[0] if config.orthogonalization == "qr" else basis
        self.energy = found
