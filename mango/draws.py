"""Random draws that depend on counters alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gaussian(shape: Sequence[int], seed: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussian values that depend on ``seed``, counters such as (seed, step, layer), alone: a resumed run draws the same ones."""
    return torch.randn(*shape, generator=counter_generator(seed, device), device=device, dtype=dtype)


def counter_generator(seed: Sequence[int], device: torch.device | str = "cpu") -> torch.Generator | None:
    """A generator for one step, seeded by mixing the counters (splitmix64): nothing but plain numbers needs to be saved.

    None for the meta device, which draws nothing.
    """
    if torch.device(device).type == "meta":
        return None
    state = 0
    for counter in seed:
        state = (state + counter + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return torch.Generator(device).manual_seed(state & 0x7FFFFFFFFFFFFFFF)
