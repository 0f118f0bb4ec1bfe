"""Jobs side by side on a CPU, each on its share of torch's threads.

On all threads at once, half of each matrix lies in another core's cache from one pass to the next, small factorisations leave all threads
but one idle, and each pass lasts until the slowest thread is done. In a lane a matrix stays with its threads, and lanes wait for each other
at the end of a step alone. Python's lock is common to them, so jobs have to be few and large.

Where torch has no more threads than there are lanes, a lane is one of the threads of its OpenMP team: threads of our own would share the
processor with that team, which spins for milliseconds after an operation of torch, waiting for more work.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache, lru_cache
from math import inf
from typing import Any, TypeVar

import torch

from mango.native.threads import on_team

LANES = 2  # each needs scratch memory of its own
TOGETHER = 1.3  # how much longer a job keeps all threads busy than its lane's, about: 1.2 to 1.7 by rank, stored error and processor
JOB = 1 << 20  # values that take as long as what a job costs whatever its size, the small operations of a stack
SPLITS = 64  # divisions that are looked at, in the order in which they are made
T = TypeVar("T")


def count(device: torch.device) -> int:
    """How many lanes work on this device: 1 where torch has a single thread, and on cards, which have queues of their own."""
    return min(LANES, torch.get_num_threads()) if device.type == "cpu" else 1


def run(jobs: Sequence[Callable[[int], T]], sizes: Sequence[int], lanes: int) -> list[T]:
    """The results of ``job(lane)``, lane < lanes, in the order of the jobs; begun from the largest on.

    Jobs so large that a lane would be left without work are run before, on all threads. Modes of torch that belong to a thread, such as
    ``no_grad``, do not reach a lane. A failure is raised once all lanes have ended: the lane that failed begins no other job, and after an
    interrupt, which stops the caller's own job where it is, none does.
    """
    order = sorted(range(len(jobs)), key=lambda place: -sizes[place])
    first = alone(tuple(sizes[place] for place in order), lanes)
    results = {place: jobs[place](0) for place in order[:first]}
    if order[first:]:
        _work(iter([(place, jobs[place]) for place in order[first:]]), results, lanes)
    return [results[place] for place in range(len(jobs))]


@lru_cache(maxsize=64)
def divide(groups: tuple[tuple[int, int, int], ...], lanes: int) -> tuple[tuple[int, ...], ...]:
    """How many members of each group to take together in a job: the more, the fewer jobs, each of which costs time of its own; but not so
    many that lanes are left without work.

    Args:
        groups: of each its members, the values of one, and how many may be taken together.
        lanes: that will share the jobs.

    Returns:
        For each group the members of its jobs, which differ by one at most.
    """
    parts = [-(-members // most) for members, _, most in groups]
    found, least = list(parts), inf
    for _ in range(SPLITS):
        jobs = [(JOB + each * count, place) for place, (members, each, _) in enumerate(groups) for count in _even(members, parts[place])]
        sizes = [size for size, _ in jobs]
        time = min(_times(tuple(sorted(sizes, reverse=True)), lanes))
        if time < least:
            found, least = list(parts), time
        larger = [(size, place) for size, place in jobs if size > JOB + groups[place][1]]
        if not larger or least <= sum(sizes) / lanes:  # which more jobs only raise
            break
        parts[min(larger)[1]] += 1
    return tuple(_even(members, into) for (members, _, _), into in zip(groups, found, strict=True))


def _even(members: int, into: int) -> tuple[int, ...]:
    return tuple(members * (part + 1) // into - members * part // into for part in range(into))


@lru_cache(maxsize=64)
def alone(sizes: tuple[int, ...], lanes: int) -> int:
    """How many of the largest are best run on all threads, one by one, before the others; sizes: descending."""
    if lanes == 1:
        return len(sizes)
    times = _times(sizes, lanes)
    return times.index(min(times))


def _times(sizes: tuple[int, ...], lanes: int) -> list[float]:
    """How long the jobs take with none, one, two, … of the largest run alone."""
    return [TOGETHER * sum(sizes[:alone]) / lanes + _longest(sizes[alone:], lanes) for alone in range(min(len(sizes), 2 * lanes) + 1)]


def _longest(sizes: Sequence[int], lanes: int) -> int:
    """The length of the longest lane when each takes the next job once it is free."""
    ends = [0] * lanes
    for size in sizes:
        ends[ends.index(min(ends))] += size
    return max(ends)


def _work(waiting: Iterator[tuple[int, Callable[[int], T]]], results: dict[int, T], lanes: int) -> None:
    threads = torch.get_num_threads()
    failures: list[BaseException] = []

    def work(lane: int) -> None:
        try:
            torch.set_num_threads(threads // lanes + (lane < threads % lanes))  # of this thread
            for place, job in waiting:
                results[place] = job(lane)
        except BaseException as failure:
            failures.append(failure)
            if not isinstance(failure, Exception):  # an interrupt: nothing else begins
                deque(waiting, maxlen=0)

    try:
        if threads > lanes or not on_team(work, lanes):
            _on_pool(work, lanes, waiting)
    finally:
        torch.set_num_threads(threads)  # for threads that are made later: they take the last number that any thread was given
    if failures:
        raise failures.pop(0)


def _on_pool(work: Callable[[int], None], lanes: int, waiting: Iterator[Any]) -> None:
    """``work`` on threads of ours, which may have teams of their own; torch's would have none within a team."""
    begun: list[Future[None]] = []
    try:
        for lane in range(lanes):
            begun.append(_pool().submit(work, lane))
        wait(begun)
    except BaseException:  # an interrupt: nothing works on when the caller goes on
        deque(waiting, maxlen=0)
        wait(begun)
        raise


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(LANES, "mango-lane")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork: the child starts its own
