"""Diagnostics, comparisons with the true gradient, and health checks of one layer in one backward pass."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mango.errors import NonFinite, Unhealthy
from mango.mole.config import MoleConfig
from mango.mole.factors import Factors
from mango.subspace import estimate_energy, principal_cosines

if TYPE_CHECKING:
    from mango.mole.layer import Layer
    from mango.mole.tracked import Products

Row = dict[str, object]
Sink = Callable[[Row], None]  # e.g. RunLog.write, or a wandb run's log

DEPENDENT = 1e-2  # of |VᵀV - I|: far above rounding, also of a basis kept in bfloat16
SPECTRUM = 8  # singular values that a comparison lists


class Watch:
    """Looks at one backward pass of a layer; nothing here draws from torch's generator or changes a gradient.

    Each row that it hands to the layer's sink holds layer, step (backward passes so far), and
    ``energy_capture``: the share of ‖G‖² that is in the factors; Hutchinson's estimate for factored gradients, 1 for formed ones, None for
    a sketch, which cannot know; ``gradient_norm_compression_ratio``: ‖what is handed on‖ / ‖G‖; ``subspace_quality``: mean cosine of the
    principal angles with the basis before; ``trust_scaling_factor`` ‖G‖ / ‖factors‖ and its standard error ``trust_scaling_error``;
    ``condition_number``: of the factors; ``layer_memory_usage``: bytes kept for the layer in the last forward pass, counted on the tensors
    that are kept, and ``memory_saved_mb``: 2^20 bytes by which the tensors that they replace are larger. A comparison adds
    ``shadow_norm_ratio``, ``shadow_cosine`` and the leading singular values ``shadow_spectrum`` (true) and ``spectrum`` (handed on). With
    ``health="repair"`` a row also lists ``faults``; the basis of such a layer has been forgotten and is seeded anew, while a gradient that
    vanishes is only told. Output gradients that are not finite always raise.

    Args:
        layer: that is looked at.
        diagnose, shadow: what is due.
    """

    def __init__(self, layer: Layer, diagnose: bool, shadow: bool) -> None:
        self.layer, self.diagnose = layer, diagnose
        self.row: Row = {"layer": layer.name, "step": layer.steps}
        self.faults: list[str] = []
        self.truth = list(layer.truth) if shadow else []
        self.true: Tensor | None = None
        layer.truth = []
        if diagnose:
            self._check_basis()

    def add(self, b: Tensor) -> None:
        """Output gradients of one chunk, in the order of the forward pass."""
        layer = self.layer
        if self.diagnose and layer.config.health != "off" and not bool(b.isfinite().all()):
            raise NonFinite(f"the output gradients of {layer.name} hold NaN or infinity at step {layer.steps}")
        if self.truth:
            part = b.mT.float() @ self.truth.pop(0).float()
            self.true = part if self.true is None else self.true.add_(part)

    def finish(self, handed: Tensor | Factors, products: Products | None = None) -> None:
        """What the layer hands on, and the products with its gradient where it was not formed."""
        layer = self.layer
        if self.diagnose:
            norm = _norm(handed)
            self.row |= self._shares(handed, norm, products)
            self.row |= {
                "layer_memory_usage": layer.kept,
                "memory_saved_mb": (layer.replaced - layer.kept) / 2**20,
            }
            # an output projection that starts at zero gives the layers before it no gradient in the first step
            if norm == 0.0 and layer.steps > 1:
                self._fault("its gradient vanishes", repair=False)
            share = self.row.get("energy_capture")
            if isinstance(share, float) and share < layer.config.min_energy:
                self._fault(f"its basis captures {share:.3g} of the gradient, less than min_energy = {layer.config.min_energy:g}")
        if self.true is not None:
            self.row |= _compare(handed.product() if isinstance(handed, Factors) else handed, self.true)
        if layer.sink is not None and len(self.row) > 2:
            layer.sink(self.row)

    def _shares(self, handed: Tensor | Factors, norm: float, products: Products | None) -> Row:
        layer = self.layer
        row: Row = {"energy_capture": 1.0, "gradient_norm_compression_ratio": 1.0}
        if layer.sketch is not None:
            row = {"energy_capture": None, "gradient_norm_compression_ratio": None}
        held = layer.held
        if held is not None and held.previous is not None and held.basis is not None and held.previous.shape == held.basis.shape:
            row["subspace_quality"] = float(principal_cosines(held.basis, held.previous).mean())
        if isinstance(handed, Factors):
            values = torch.linalg.eigvalsh(handed.coefficients @ handed.coefficients.mT).clamp_min(0.0).sqrt()
            row["condition_number"] = float(values[-1] / values[0].clamp_min(torch.finfo(values.dtype).tiny))
        if products is not None and isinstance(handed, Factors) and layer.tracked is not None:
            probes = layer.tracked.draw((layer.tracked.small, layer.config.probes), 4, handed.basis.device)
            share, error = (float(value) for value in estimate_energy(handed.basis, products.gram, probes))
            total = float(torch.linalg.matrix_norm(products.right(handed.basis))) / max(share, 1e-12) ** 0.5
            row["energy_capture"] = share
            row["gradient_norm_compression_ratio"] = norm / total if total else 1.0
            row["trust_scaling_factor"] = max(share, 1e-12) ** -0.5
            row["trust_scaling_error"] = 0.5 * error * max(share, 1e-12) ** -1.5
        return row

    def _check_basis(self) -> None:
        """Before the basis is used: orthonormalisation would hide what is wrong with it."""
        held = self.layer.held
        if held is None or held.basis is None or self.layer.config.health == "off":
            return
        if not bool(held.basis.isfinite().all()):
            self._fault("its basis holds NaN or infinity")
            return
        gram = held.basis.mT @ held.basis
        dead = gram.diagonal() < 0.5
        if bool(dead.any()):
            self._fault(f"{int(dead.sum())} of {len(dead)} columns of its basis have collapsed to zero")
            return
        off = (gram - torch.diag(gram.diagonal())).abs()
        if float(off.max()) > DEPENDENT:
            one, two = divmod(int(off.argmax()), len(gram))
            self._fault(f"columns {one} and {two} of its basis are dependent")

    def _fault(self, what: str, repair: bool = True) -> None:
        layer = self.layer
        if layer.config.health == "off":
            return
        if layer.config.health == "stop":
            raise Unhealthy(f"{layer.name} at step {layer.steps}: {what}")
        self.faults.append(what)
        self.row["faults"] = self.faults
        if repair and layer.held is not None:
            layer.held.reseed()


def due(layer: Layer, steps: int) -> tuple[bool, bool]:
    """Whether diagnostics and a comparison are due at this backward pass."""
    config = layer.config
    diagnose = config.diagnostics_every > 0 and steps % config.diagnostics_every == 0
    return diagnose, compares(config, layer.name, steps)


def compares(config: MoleConfig, name: str, steps: int) -> bool:
    return config.shadow_every > 0 and steps % config.shadow_every == 0 and re.search(config.shadow, name) is not None


def _norm(handed: Tensor | Factors) -> float:
    """Of the gradient handed on; of factors without their unbiased rest."""
    return float(torch.linalg.matrix_norm((handed.coefficients if isinstance(handed, Factors) else handed).float()))


def _compare(handed: Tensor, true: Tensor) -> Row:
    handed = handed.float()
    norms = [float(torch.linalg.matrix_norm(matrix)) for matrix in (handed, true)]
    cosine = float((handed * true).sum()) / max(norms[0] * norms[1], torch.finfo(torch.float32).tiny)
    ratio = norms[0] / max(norms[1], torch.finfo(torch.float32).tiny)
    return {"shadow_norm_ratio": ratio, "shadow_cosine": cosine, "shadow_spectrum": _spectrum(true), "spectrum": _spectrum(handed)}


def _spectrum(matrix: Tensor) -> Sequence[float]:
    return torch.linalg.svdvals(matrix)[:SPECTRUM].tolist()
