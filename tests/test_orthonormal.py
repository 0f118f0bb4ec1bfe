"""mango.orthonormal: bases of any input, on the path for accelerators too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mango import orthonormalize
from mango.draws import gaussian
from mango.orthonormal import _shifted_cholesky_qr, _unit_columns, cholesky_qr

KINDS = ("gaussian", "graded", "dependent", "zero", "tiny", "huge", "half", "nearly equal", "zero column", "repeated")


def make(kind: str, n: int, k: int, seed: int) -> Tensor:
    x = gaussian((n, k), (seed,))
    if kind == "graded":
        return x @ torch.diag(10.0 ** -torch.linspace(0, 12, k))
    if kind == "dependent":
        return x @ gaussian((k, max(1, k // 3)), (seed, 1)) @ gaussian((max(1, k // 3), k), (seed, 2))
    if kind == "nearly equal":
        return 1 + 1e-4 * x
    if kind == "zero column":
        return x.index_fill(1, torch.tensor([k // 2]), 0.0)
    if kind == "repeated":
        return x[:, :1].expand(n, k)
    return {"zero": x * 0, "tiny": x * 1e-30, "huge": x * 1e30, "half": x.bfloat16()}.get(kind, x)


def defect(v: Tensor) -> float:
    gram = v.double().mT @ v.double()
    return float(torch.linalg.matrix_norm(gram - torch.eye(v.shape[-1], dtype=torch.float64)).max())


def outside(x: Tensor, v: Tensor) -> float:
    """The share of x (n, k) that the span of v misses, column by column."""
    unit = _unit_columns(x.double())[0]
    return float(torch.linalg.vector_norm(unit - v.double() @ (v.double().mT @ unit), dim=0).max())


@settings(max_examples=80, deadline=None)
@given(kind=st.sampled_from(KINDS), n=st.integers(1, 80), k=st.integers(1, 90), seed=st.integers(0, 1000))
def test_orthonormal_and_spanning_for_any_input(kind: str, n: int, k: int, seed: int) -> None:
    x = make(kind, n, k, seed)
    v = orthonormalize(x)
    assert v.shape == (n, min(n, k)) and v.dtype == torch.float32
    assert defect(v) <= 1e-5
    assert outside(x[:, : min(n, k)], v) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, k", [(2048, 128), (256, 256), (1024, 1)])
def test_orthonormal_at_working_sizes(kind: str, n: int, k: int) -> None:
    assert defect(orthonormalize(make(kind, n, k, 0))) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, k", [(512, 64), (96, 96), (33, 1)])
def test_the_path_for_accelerators_holds_the_same_bound(kind: str, n: int, k: int) -> None:
    x = _unit_columns(make(kind, n, k, 0).float())[0]
    v, diagonal = _shifted_cholesky_qr(x)
    assert defect(v) <= 1e-5
    if kind not in ("graded", "nearly equal"):  # columns that depend on earlier ones to 1e-4 may be replaced there
        assert outside(x, v) <= 1e-4
    if kind == "gaussian":
        assert torch.allclose(diagonal, torch.linalg.qr(x.double())[1].diagonal().abs().float(), rtol=1e-3, atol=1e-5)


def test_leading_columns_and_signs_follow_the_input() -> None:
    x = gaussian((40, 6), (0,))
    v = orthonormalize(x)
    for k in range(1, 7):
        assert outside(x[:, :k], v[:, :k]) <= 1e-5
    assert bool(((v * x).sum(0) > 0).all())  # R has a positive diagonal, so a basis does not flip from step to step


def test_batches_are_independent_even_when_one_member_falls_back() -> None:
    members = [make(kind, 48, 8, 3) for kind in ("gaussian", "dependent", "zero", "graded")]
    batch = orthonormalize(torch.stack([m.float() for m in members]))
    for member, v in zip(members, batch, strict=True):
        assert torch.allclose(orthonormalize(member), v, atol=1e-5)
    assert orthonormalize(torch.randn(2, 3, 20, 4)).shape == (2, 3, 20, 4)
    assert orthonormalize(torch.randn(5, 0)).shape == (5, 0)


def test_double_stays_double() -> None:
    v = orthonormalize(gaussian((30, 5), (0,), dtype=torch.float64))
    assert v.dtype == torch.float64 and defect(v) < 1e-13


@pytest.mark.parametrize("rough", [False, True])
@pytest.mark.parametrize("kind", ["gaussian", "graded", "nearly equal", "zero column"])
def test_columns_are_sorted_by_what_they_add_on_every_path(kind: str, rough: bool) -> None:
    """One round of Cholesky, two, and Householder's QR."""
    x = torch.stack([make(kind, 60, 6, seed) for seed in range(3)])
    size = torch.rand(3, 6, generator=torch.Generator().manual_seed(1)) + 0.1
    basis, diagonal = cholesky_qr(x, rough=rough)
    strength, order = (diagonal / size).square().sort(dim=-1, descending=True, stable=True)
    found, energy = cholesky_qr(x, size, rough)
    assert torch.equal(energy, strength)
    assert torch.allclose(found, basis.gather(-1, order.unsqueeze(-2).expand_as(basis)), atol=1e-6)
