"""How methods are judged: recovered gaps, when a task decides, paired tests over seeds."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mango.errors import ConfigError
from mango.training import judge


def test_recovered_gap_has_its_closed_form_and_needs_a_gap() -> None:
    dense, frozen = [1.00, 1.01, 0.99], [2.0, 2.0, 2.0]
    found = judge.recovered({0: 1.1, 1: 0.9, 2: 1.0}, dense, frozen)
    assert found.per_seed == pytest.approx({0: 0.9, 1: 1.1, 2: 1.0})
    assert found.value == pytest.approx(1.0)
    assert found.std == pytest.approx(0.1)
    assert judge.gap(dense, frozen).ratio == pytest.approx(100.0)
    assert judge.gap(dense, [1.09] * 3).reason is not None, "nine standard deviations are no proof"
    assert judge.recovered({0: 1.0}, dense, [1.09] * 3).value is None
    assert "does not" not in str(judge.gap(dense, [1.11] * 3).reason)
    assert judge.gap(dense, [1.11] * 3).passed


@pytest.mark.parametrize(
    ("dense", "frozen", "words"),
    [
        ([1.0], [2.0], "one seed"),
        ([2.0, 2.1], [1.0, 1.0], "no worse"),
        ([1.0, 1.5], [2.0, 2.0], "below 10"),
        ([math.nan, 1.0], [2.0], "not finite"),
    ],
)
def test_no_verdict_comes_with_a_reason(dense: list[float], frozen: list[float], words: str) -> None:
    assert words in str(judge.recovered({0: 1.0}, dense, frozen).reason)


def test_a_control_without_runs_is_an_error() -> None:
    with pytest.raises(ConfigError, match="dense losses"):
        judge.gap([], [1.0])
    with pytest.raises(ConfigError, match="at least one seed"):
        judge.paired({0: 1.0}, {1: 1.0})


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=2, max_size=12))
def test_the_paired_test_is_scipys(pairs: list[tuple[float, float]]) -> None:
    from scipy import stats

    a, b = ({seed: pair[side] for seed, pair in enumerate(pairs)} for side in (0, 1))
    found = judge.paired(a, b)
    differences = [x - y for x, y in pairs]
    if found.p_value is None:
        assert len(set(differences)) == 1
        return
    if max(differences) - min(differences) < 1e-6:  # a test of rounding
        return
    reference = stats.ttest_1samp(differences, 0.0)
    assert found.p_value == pytest.approx(reference.pvalue, abs=1e-9)
    assert found.interval == pytest.approx(tuple(reference.confidence_interval(0.95)), rel=1e-6, abs=1e-9)
