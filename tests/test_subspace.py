"""mango.subspace: orthonormality at all times, T2 and T3's guarantees, scouts, rotations, energies."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mango import Subspace, orthonormalize
from mango.draws import gaussian
from mango.errors import ConfigError
from mango.subspace import (
    captured_energy,
    estimate_energy,
    half_step,
    power_step,
    principal_cosines,
    rotate_moments,
    rotation,
    scout_alpha,
)


def defect(v: Tensor) -> float:
    gram = v.double().mT @ v.double()
    return float(torch.linalg.matrix_norm(gram - torch.eye(v.shape[-1], dtype=torch.float64)).max())


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    scouts=st.integers(0, 3),
    rank=st.integers(3, 8),
    zero=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
)
def test_basis_is_orthonormal_at_all_times(seed: int, scouts: int, rank: int, zero: bool, dtype: torch.dtype) -> None:
    space = Subspace(24, rank, scouts=scouts, batch=(2,), seed=seed, dtype=dtype)
    assert defect(space.basis) <= 1e-5
    for step in range(3):
        space.step(gaussian((2, 24, 17), (seed, step)) * (0.0 if zero else 1.0))
        assert defect(space.basis) <= 1e-5
        assert space.drift.shape == (2, rank) and bool((space.drift <= 1).all())


def test_converges_to_the_dominant_singular_directions() -> None:
    left, _, _ = torch.linalg.svd(gaussian((60, 60), (1,)))
    right, _, _ = torch.linalg.svd(gaussian((80, 80), (2,)))
    values = 2.0 ** -torch.arange(60.0)
    g = left @ torch.diag(values) @ right[:60]
    space = Subspace(60, 6, scouts=1, seed=3)
    for _ in range(12):
        space.step(g)
    assert float(principal_cosines(space.basis[:, :5], left[:, :5]).min()) > 1 - 1e-5
    assert math.isclose(float(space.energy(g)), float(values[:6].square().sum() / values.square().sum()), rel_tol=1e-4)
    gram = Subspace(60, 6, scouts=1, seed=3)
    for _ in range(12):
        gram.step(lambda x: g @ (g.mT @ x))
    assert float(principal_cosines(gram.basis[:, :5], left[:, :5]).min()) > 1 - 1e-4


def test_scouts_adopt_a_direction_that_the_warm_start_cannot_see() -> None:
    eye = torch.eye(30)
    before, after = torch.diag(torch.tensor([3.0, 2.0] + [0.0] * 28)), torch.diag(torch.tensor([3.0, 0.0, 0.0, 5.0] + [0.0] * 26))
    blind, seeing = Subspace(30, 2, scouts=0), Subspace(30, 2, scouts=1)
    for space in (blind, seeing):
        for _ in range(30):
            space.step(before)
        assert float(captured_energy(space.basis, eye[:, :2])) > 1 - 1e-6
        space._basis = eye[:, :2].clone()  # no rounding error that could grow into the new direction
        for _ in range(4):
            space.step(after)
    assert float(seeing.energy(after)) > 0.999
    assert float(blind.energy(after)) < 0.3  # control: 9 / 34


def test_one_step_never_does_worse_than_the_basis_it_started_from() -> None:
    for seed in range(20):  # T2, twice
        g, v = gaussian((20, 31), (seed, 0)), orthonormalize(gaussian((20, 4), (seed, 1)))
        assert float(captured_energy(power_step(v, g)[0], g)) >= float(captured_energy(v, g)) - 1e-6


@given(seed=st.integers(0, 1000), damping=st.floats(0.1, 30.0), scouts=st.integers(0, 4))
def test_a_damped_step_never_does_worse_than_what_it_started_from(seed: int, damping: float, scouts: int) -> None:
    g, v = gaussian((20, 31), (seed, 0)), orthonormalize(gaussian((20, 5), (seed, 1)))
    fresh = gaussian((20, scouts), (seed, 2))
    start = orthonormalize(torch.cat([v[:, : 5 - scouts], fresh], dim=-1))  # T3
    assert float(captured_energy(power_step(v, g, fresh, damping)[0], g)) >= float(captured_energy(start, g)) - 1e-6


def test_damping_holds_the_basis_and_leaves_scouts_free() -> None:
    g, v, fresh = gaussian((20, 31), (1,)), orthonormalize(gaussian((20, 5), (2,))), gaussian((20, 2), (3,))
    moves = [power_step(v, g, fresh, damping) for damping in (0.0, 3.0, 1e6)]
    angles = [float(principal_cosines(v[:, :3], basis).min()) for basis, _ in moves]
    assert angles[0] < angles[1] < angles[2] and angles[2] > 1 - 1e-6
    free = torch.linalg.qr(torch.cat([v[:, :3], g @ (g.mT @ (fresh - v[:, :3] @ (v[:, :3].mT @ fresh)))], dim=-1)).Q
    assert float(principal_cosines(moves[2][0], free).min()) > 1 - 1e-6
    same = power_step(v, lambda x: g @ (g.mT @ x), fresh, 3.0)
    assert float(principal_cosines(same[0], moves[1][0]).min()) > 1 - 1e-5 and torch.allclose(same[1], moves[1][1], rtol=1e-3)
    for nothing in (torch.zeros(1, 20, 31), torch.zeros(1, 20, 31, dtype=torch.bfloat16)):
        assert float(principal_cosines(v[None, :, :3], power_step(v[None], nothing, fresh[None], 3.0)[0]).min()) > 1 - 1e-5
    u = torch.linalg.svd(g, full_matrices=False)
    _, energy = power_step(u[0][:, :5], g, damping=3.0)
    assert torch.allclose(energy, u[1][:5].square(), rtol=1e-4), "exact for singular vectors"


@pytest.mark.parametrize("scouts", [1, 3])
def test_scout_certificate_holds_in_expectation_on_the_worst_case(scouts: int) -> None:
    dim, rank, draws = 12, 4, 4000
    v = torch.eye(dim)[:, :rank].expand(draws, dim, rank)
    alpha = scout_alpha(dim, rank, scouts)
    assert alpha == scouts / (dim - rank + scouts)
    g = torch.eye(dim)[:, rank - scouts :]  # flat, and orthogonal to the columns that are kept
    fresh = gaussian((draws, dim, scouts), (1,))
    q = orthonormalize(torch.cat([v[..., : rank - scouts], fresh], -1))
    scout = captured_energy(q, g.expand(draws, -1, -1))  # T3's equality case, without the power step
    assert abs(float(scout.mean()) - alpha) < 5 * float(scout.std()) / draws**0.5 + 1e-6
    captured = captured_energy(power_step(v, g.expand(draws, -1, -1), fresh)[0], g)
    assert float(captured.mean()) >= alpha - 5 * float(captured.std()) / draws**0.5 - 1e-6
    hidden = torch.eye(dim)[:, rank:]  # control: without scouts the step is stuck, and nothing is certified
    assert scout_alpha(dim, rank, 0) == 0.0 and float(captured_energy(power_step(v[0], hidden)[0], hidden)) < 1e-6
    assert scout_alpha(dim, dim, 0) == 1.0


def test_reused_scouts_lose_the_certificate() -> None:
    fresh = gaussian((10, 1), (5,))
    v = torch.eye(10)[:, :3]
    used = orthonormalize(torch.cat([v[:, :2], fresh], -1))
    complement = torch.linalg.qr(torch.cat([used, torch.eye(10)], -1))[0][:, 3:]
    g = complement[:, :1] @ gaussian((1, 7), (6,))  # chosen after the scout was seen
    assert float(captured_energy(used, g)) < 1e-10
    assert float(captured_energy(power_step(v, g, gaussian((10, 1), (7,)))[0], g)) > 0.99


def test_energy_estimate_of_columns_is_a_lower_bound_and_sorts() -> None:
    g = gaussian((40, 50), (0,)) * torch.linspace(2, 0.1, 40).unsqueeze(1)
    v, energy = power_step(orthonormalize(gaussian((40, 6), (1,))), g)
    assert all(a >= b for a, b in pairwise(energy.tolist()))
    single, estimate = power_step(orthonormalize(gaussian((40, 1), (2,))), g)
    assert float(estimate) <= float((single.mT @ g).square().sum()) * (1 + 1e-5)
    assert float(estimate) > 0.3 * float((single.mT @ g).square().sum())
    damped, lower = power_step(orthonormalize(gaussian((40, 1), (2,))), g, damping=3.0)
    assert float(lower) <= float((damped.mT @ g).square().sum()) * (1 + 1e-5)
    same = power_step(orthonormalize(gaussian((40, 6), (1,))), lambda x: g @ (g.mT @ x))
    assert torch.allclose(energy, same[1], rtol=1e-3) and float(principal_cosines(v, same[0]).min()) > 1 - 1e-4


def test_rotation_of_moments() -> None:
    old = orthonormalize(gaussian((30, 5), (0,)))
    order, signs = torch.tensor([3, 1, 4, 0, 2]), torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    r = rotation(old[:, order] * signs, old)
    m, v = gaussian((5, 9), (1,)), gaussian((5, 9), (2,)).square()
    turned_m, turned_v = rotate_moments(r, m, v)
    assert torch.allclose(turned_m, m[order] * signs.unsqueeze(1), atol=1e-5)
    assert torch.allclose(turned_v, v[order], atol=1e-5)
    angle = 0.3  # uncorrelated coordinates: the second moment of the rotated ones in closed form
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    draws = gaussian((2, 400_000), (3,)) * torch.tensor([[2.0], [0.5]])
    _, moment = rotate_moments(turn, torch.zeros(2, 1), draws.square().mean(1, keepdim=True))
    assert torch.allclose(moment, (turn @ draws).square().mean(1, keepdim=True), rtol=0.02)


def test_estimated_energy_agrees_with_the_exact_one_within_its_error() -> None:
    g, v = gaussian((50, 70), (0,)), orthonormalize(gaussian((50, 8), (1,)))
    exact = float(captured_energy(v, g))
    errors = []
    for seed in range(40):
        value, error = estimate_energy(v, lambda x: g @ (g.mT @ x), gaussian((50, 16), (2, seed)))
        errors.append((float(value) - exact) / float(error))
    assert abs(sum(errors) / 40) < 5 / 40**0.5
    assert 0.5 < (sum(e * e for e in errors) / 40) ** 0.5 < 2.0  # the standard error is of the right size
    with pytest.raises(ConfigError, match=r"probes.shape\[-1\] = 1 is not legal: at least 2"):
        estimate_energy(v, lambda x: x, gaussian((50, 1), (0,)))


def test_rank_at_or_above_the_dimension_spans_everything() -> None:
    for rank in (6, 9):
        space = Subspace(6, rank)
        g = gaussian((6, 11), (0,))
        space.step(g)
        assert space.basis.shape == (6, 6) and abs(float(space.energy(g)) - 1) < 1e-5 and space.alpha == 1.0


def test_resumes_bit_for_bit() -> None:
    one = Subspace(32, 4, seed=7, dtype=torch.bfloat16)
    for step in range(3):
        one.step(gaussian((32, 20), (step,)))
    two = Subspace(32, 4, seed=7, dtype=torch.bfloat16)
    two.load_state_dict(one.state_dict())
    for step in range(3, 6):
        assert torch.equal(one.step(gaussian((32, 20), (step,))), two.step(gaussian((32, 20), (step,))))
    assert torch.equal(one.drift, two.drift)
    with pytest.raises(ConfigError, match=r"state\['basis'\]"):
        Subspace(32, 5).load_state_dict(one.state_dict())


def test_drift_is_one_for_a_still_matrix_and_zero_for_a_new_one() -> None:
    g = torch.diag(torch.tensor([4.0, 3.0] + [0.0] * 8))
    space = Subspace(10, 2, scouts=0)
    for _ in range(20):
        space.step(g)
    assert float(space.drift.min()) > 1 - 1e-5
    # from equal rows the two columns would be one, and the second a matter of rounding
    space.step(torch.diag(torch.tensor([0.0, 0.0, 5.0, 4.0] + [0.0] * 6)) + 1e-3 * gaussian((10, 10), (0,)))
    assert float(space.drift.max()) < 0.1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"dim": 0, "rank": 1}, "dim = 0 is not legal: an integer >= 1"),
        ({"dim": 4, "rank": 0}, "rank = 0 is not legal: an integer >= 1"),
        ({"dim": 4, "rank": 2, "scouts": 3}, "scouts = 3 is not legal: an integer from 0 to the rank, 2"),
        ({"dim": 4, "rank": 2, "scouts": -1}, "scouts = -1 is not legal"),
        ({"dim": 4, "rank": 2, "dtype": torch.int64}, "dtype = torch.int64 is not legal"),
    ],
)
def test_bad_input(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Subspace(**arguments)  # type: ignore[arg-type]


def test_a_gradient_of_another_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"g.shape = \(5, 4\) is not legal: \(4,\) and one more dimension"):
        Subspace(4, 2).step(torch.zeros(5, 4))


@pytest.mark.parametrize("rank", [1, 4, 12])
@pytest.mark.parametrize("scouts", [1, 3])
def test_half_step_contracts_with_its_certificate_whatever_it_starts_from(rank: int, scouts: int) -> None:
    """T3 for the half step, on its worst case: a flat spectrum, and a start that G maps to zero."""
    if scouts > rank:
        return
    dim, n, draws = 20, 32, 4000
    g = torch.zeros(dim, n)
    g[:, :dim] = torch.linalg.qr(gaussian((dim, dim), (1,)))[0]
    blind = torch.zeros(draws, rank - scouts, n)
    blind[..., dim:] = gaussian((draws, rank - scouts, n - dim), (2,))  # in the null space of G
    start = torch.cat([blind, gaussian((draws, scouts, n), (3,))], dim=1)
    basis = half_step(g.expand(draws, -1, -1), start)
    assert float((basis.mT @ basis - torch.eye(rank)).abs().max()) < 1e-5
    left = 1 - captured_energy(basis, g)
    mean, error = float(left.mean()), float(left.std() / draws**0.5)
    assert mean <= 1 - scouts / dim + 5 * error
    random = half_step(g.expand(draws, -1, -1), gaussian((draws, rank, n), (4,)))
    assert float((1 - captured_energy(random, g)).mean()) == pytest.approx(1 - rank / dim, abs=0.01)  # attained by a flat spectrum


def test_half_step_from_the_right_singular_vectors_is_exact_and_sorted() -> None:
    u, _ = torch.linalg.qr(gaussian((24, 24), (1,)))
    v, _ = torch.linalg.qr(gaussian((40, 40), (2,)))
    s = 1.5 ** -torch.arange(24.0)
    g = u @ torch.diag(s) @ v[:, :24].T
    basis = half_step(g, v[:, [2, 0, 1]].T * torch.tensor([[1e3], [1.0], [1e-3]]))  # any scale and order of the start
    assert torch.allclose((basis.T @ u[:, :3]).abs(), torch.eye(3), atol=1e-4)


@pytest.mark.parametrize("layers", [1, 3])
def test_half_step_in_bfloat16_finds_the_same_subspace(layers: int) -> None:
    g = gaussian((layers, 300, 500), (1,)) @ torch.diag(1.05 ** -torch.arange(500.0))
    start = gaussian((layers, 16, 500), (2,))
    exact, rounded = half_step(g, start), half_step(g.bfloat16(), start)
    assert float((rounded.mT @ rounded - torch.eye(16)).abs().max()) < 2**-9
    assert float(captured_energy(rounded, g).min()) == pytest.approx(float(captured_energy(exact, g).min()), abs=2e-3)
    dependent = start.clone()
    dependent[:, 8:] = dependent[:, :8]  # too ill-conditioned for one round
    basis = half_step(g.bfloat16(), dependent)
    assert float((basis.mT @ basis - torch.eye(16)).abs().max()) < 2**-9
