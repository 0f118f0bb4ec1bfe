"""Shared by all tests."""

from __future__ import annotations

import torch
from hypothesis import settings

# examples are the same on every run and are not timed: the machines that run the tests differ
settings.register_profile("mango", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("mango")
torch.manual_seed(0)
