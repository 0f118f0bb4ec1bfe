"""The loss of a model, and its mean loss and accuracy over a split."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from mango.training.task import Train

TOP5_FROM = 11  # classes: with fewer, five guesses say little


def cross_entropy(model: nn.Module, inputs: Tensor, targets: Tensor, settings: Train, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cross-entropy, a scalar, and logits: (b, classes) of images, the last (b, t, vocabulary) of tokens.

    targets: (b,), (b, classes) where images are mixed, or (b, t).
    """
    inputs = inputs if settings.channels_last else inputs.contiguous()
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.autocast == "bf16"):
        logits = model(inputs)
    if logits.dim() == 3:
        logits = logits[:, -targets.shape[1] :]
    flat = targets if targets.is_floating_point() else targets.flatten()
    return functional.cross_entropy(logits.flatten(0, -2).float(), flat), logits


@torch.no_grad()
def mean_scores(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], settings: Train, device: torch.device
) -> tuple[float, float, float | None]:
    """Mean loss, accuracy and, for images of at least TOP5_FROM classes, top-5 accuracy."""
    total, correct, near, seen = 0.0, 0, 0, 0
    ranked = False
    for inputs, targets in batches:
        loss, logits = cross_entropy(model, inputs, targets, settings, device)
        total += float(loss) * targets.numel()
        correct += int((logits.argmax(-1) == targets).sum())
        ranked = logits.dim() == 2 and logits.shape[1] >= TOP5_FROM
        near += int((logits.topk(5).indices == targets[:, None]).sum()) if ranked else 0
        seen += targets.numel()
    return total / seen, correct / seen, near / seen if ranked else None
