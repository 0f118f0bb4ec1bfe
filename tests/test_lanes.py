"""Large matrices are stepped in lanes, which change neither what is computed nor the caller's threads."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from operator import length_hint

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mango import Mango
from mango.draws import gaussian
from mango.native.threads import _openmp
from mango.optim import lanes

SHAPES = ((512, 512), (512, 1024), (1024, 512), (512, 512))


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_lanes_share_torchs_threads_among_them() -> None:
    assert lanes.count(torch.device("cpu")) == 2 and lanes.count(torch.device("meta")) == 1
    torch.set_num_threads(1)
    assert lanes.count(torch.device("cpu")) == 1
    torch.set_num_threads(6)
    assert lanes.count(torch.device("cpu")) == 2
    together = threading.Barrier(2, timeout=60)  # passed only by jobs that run at the same time

    def job(number: int, lane: int) -> tuple[int, int, int]:
        together.wait()
        return number, lane, torch.get_num_threads()

    found = lanes.run([partial(job, number) for number in range(4)], [1, 1, 2, 2], 2)
    assert [number for number, _, _ in found] == [0, 1, 2, 3]  # in the order of the jobs
    assert {lane for _, lane, _ in found} == {0, 1}
    assert [threads for _, _, threads in found] == [3] * 4
    assert torch.get_num_threads() == 6
    torch.set_num_threads(5)
    assert {lane: threads for _, lane, threads in lanes.run([partial(job, number) for number in range(2)], [1, 1], 2)} == {0: 3, 1: 2}
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [5]


def test_jobs_that_would_leave_a_lane_idle_run_before_on_all_threads() -> None:
    begun: list[int] = []

    def job(number: int, lane: int) -> int:
        begun.append(number)
        return torch.get_num_threads()

    assert lanes.run([partial(job, number) for number in range(5)], [3, 1, 20, 3, 1], 2) == [1, 1, 2, 1, 1] and begun[0] == 2
    assert sorted(lanes.run([partial(job, number) for number in range(3)], [7, 7, 7], 2)) == [1, 1, 2]
    assert lanes.run([partial(job, 0)], [7], 2) == [2]


@pytest.mark.parametrize(
    ("groups", "found"),
    [
        (((4, 1, 16), (4, 4, 4), (4, 4, 4)), ((2, 2), (4,), (4,))),  # four blocks of a GPT: only the small ones are divided
        (((4, 4, 4),), ((2, 2),)),
        (((3, 4, 4),), ((1, 1, 1),)),  # one is then run on all threads, and two side by side
        (((2, 9, 1), (6, 1, 6)), ((1, 1), (3, 3))),
        (((5, 4, 4),), ((2, 3),)),
        (((40, 4, 8),), ((6, 7, 7) * 2,)),
        (((1, 8, 1),), ((1,),)),
        ((), ()),
    ],
)
def test_as_many_are_taken_together_as_leave_no_lane_without_work(
    groups: tuple[tuple[int, int, int], ...], found: tuple[tuple[int, ...], ...]
) -> None:
    millions = tuple((members, each << 20, most) for members, each, most in groups)
    assert lanes.divide(millions, 2) == found


def test_one_lane_takes_as_many_together_as_may_be() -> None:
    assert lanes.divide(((7, 3, 4), (1, 5, 4)), 1) == ((3, 4), (1,))


@pytest.mark.parametrize("threads", [2, 4])
def test_a_lane_works_in_torchs_team_where_each_has_one_thread(threads: int) -> None:
    """So no thread of that team is left to spin for more work beside the lanes."""
    torch.set_num_threads(threads)
    together, callers = threading.Barrier(2, timeout=60), list[int]()

    def job(lane: int) -> None:
        callers.append(threading.get_ident())
        together.wait()

    lanes.run([job, job], [1, 1], 2)
    assert _openmp() is not None and len(set(callers)) == 2
    assert (threading.get_ident() in callers) == (threads == 2)


@given(sizes=st.lists(st.integers(1, 100), max_size=8))
def test_every_job_runs_once_whatever_the_sizes(sizes: list[int]) -> None:
    ran: list[int] = []

    def job(number: int, lane: int) -> int:
        ran.append(number)
        return number

    assert lanes.run([partial(job, number) for number in range(len(sizes))], sizes, 2) == list(range(len(sizes)))
    assert sorted(ran) == list(range(len(sizes)))


def test_a_failure_is_raised_when_the_other_lane_has_ended() -> None:
    failed, ended = threading.Event(), list[int]()

    def fail(lane: int) -> None:
        failed.set()
        raise ValueError("of a job")

    def slow(lane: int) -> None:
        assert failed.wait(60)
        ended.append(lane)

    with pytest.raises(ValueError, match="of a job"):
        lanes.run([fail, slow, slow, slow], [1, 1, 1, 1], 2)
    assert len(ended) == 3 and torch.get_num_threads() == 2
    assert lanes.run([lambda lane: 5] * 2, [1, 1], 2) == [5, 5]


@pytest.mark.skipif(sys.platform == "win32", reason="signals of one thread")
@pytest.mark.parametrize("threads", [2, 4])
def test_an_interrupt_begins_nothing_and_waits_for_the_other_lane(threads: int) -> None:
    torch.set_num_threads(threads)
    begun, ended = list[int](), list[int]()

    def job(number: int, lane: int) -> None:
        begun.append(number)
        time.sleep(0.2)
        if number == 0:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.2)
        ended.append(number)

    lanes.run([lambda lane: None] * 2, [1, 1], 2)  # the threads are there
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a command in a shell's background ignores the signal
    try:
        with pytest.raises(KeyboardInterrupt):
            lanes.run([partial(job, number) for number in range(6)], [1] * 6, 2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(begun) == [0, 1] and torch.get_num_threads() == threads
    assert len(ended) == (1 if threads == 2 else 2)  # the caller, where it is a lane itself, stops where it is
    time.sleep(0.5)
    assert sorted(begun) == [0, 1]


def optimizer(plan: dict[str, str]) -> tuple[Mango, list[Tensor]]:
    params = [nn.Parameter(gaussian(shape, (place,)) / 32) for place, shape in enumerate(SHAPES)]
    return Mango([(f"w{place}", param) for place, param in enumerate(params)], lr=1e-2, plan=plan), list(params)


def steps(made: Mango, params: list[Tensor], first: int, last: int) -> None:
    for step in range(first, last):
        for place, param in enumerate(params):
            param.grad = gaussian(param.shape, (step, place))
        made.step()


@pytest.mark.parametrize("error", ["codec", "none"])
def test_a_step_in_lanes_is_the_step_on_one_thread(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    work = lanes._work
    monkeypatch.setattr(lanes, "_work", lambda waiting, *rest: (used.append(length_hint(waiting)), work(waiting, *rest))[1])
    made, params = optimizer({"error": error})
    made.observe()
    used.clear()  # of what the optimizer rehearsed
    steps(made, params, 0, 3)
    assert used == [2] * 3 and set(made.diagnostics()) == {"w0", "w1", "w2", "w3"}
    again, same = optimizer({"error": error})
    steps(again, same, 0, 2)
    resumed, copies = optimizer({"error": error})
    for copy, value in zip(copies, same, strict=True):
        copy.data.copy_(value)
    resumed.load_state_dict(again.state_dict())
    steps(resumed, copies, 2, 3)
    assert all(torch.equal(one, other) for one, other in zip(params, copies, strict=True))  # whichever lane a matrix fell to

    torch.set_num_threads(1)
    used.clear()
    serial, others = optimizer({"error": error})
    steps(serial, others, 0, 3)
    assert not used
    for one, other, start in zip(*([p.detach() for p in found] for found in (params, others, optimizer({})[1])), strict=True):
        moved = torch.linalg.vector_norm(other - start)
        assert float(torch.linalg.vector_norm(one - other) / moved) < 1e-3  # sums in another order, rounded to few bits


def test_a_forked_child_has_lanes_of_its_own() -> None:
    code = """
import os, torch
from mango.optim import lanes
torch.set_num_threads(2)
jobs = [lambda lane: 4] * 2
lanes.run(jobs, [1, 1], 2)
child = os.fork()
if not child:
    os._exit(sum(lanes.run(jobs, [1, 1], 2)))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "8"
