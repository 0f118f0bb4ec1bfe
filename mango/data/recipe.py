"""The usual recipe of ImageNet training beside crops and mirrors: RandAugment, mixup and label smoothing, as functions of a seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mango.compat import transforms


@dataclass(frozen=True)
class Recipe:
    """What is done to a training batch; nothing by default.

    Args:
        randaugment: magnitude (of 31) of two random operations on each image (Cubuk et al., arXiv:1909.13719; torchvision's); 0 = none.
        mixup: both parameters of the Beta distribution of the share that an image has of its mixture (Zhang et al., arXiv:1710.09412);
            0 = none. As usual one share for a batch, which is mixed with itself in reverse order.
        smoothing: probability that is taken from the labels and spread over all classes (Szegedy et al., arXiv:1512.00567).
    """

    randaugment: int = 0
    mixup: float = 0.0
    smoothing: float = 0.0

    def augment(self, images: Tensor, seed: int) -> Tensor:
        """RandAugment on each image, (b, height, width, 3) uint8."""
        if not self.randaugment:
            return images
        transform = transforms("RandAugment").RandAugment(magnitude=self.randaugment)
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator of the CPU
            torch.manual_seed(seed)
            return torch.stack([transform(image) for image in images.permute(0, 3, 1, 2)]).permute(0, 2, 3, 1)

    def mix(self, inputs: Tensor, labels: Tensor, classes: int, seed: int) -> tuple[Tensor, Tensor]:
        """Mixup and label smoothing.

        Args:
            inputs: (b, 3, height, width) floating point.
            labels: (b,) int64.

        Returns: inputs, and labels as they are or, when the recipe changes them, the probabilities of each class, (b, classes).
        """
        if not self.mixup and not self.smoothing:
            return inputs, labels
        targets = functional.one_hot(labels, classes).float() * (1 - self.smoothing) + self.smoothing / classes
        if self.mixup:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                share = float(torch.distributions.Beta(self.mixup, self.mixup).sample())
            inputs = share * inputs + (1 - share) * inputs.flip(0)
            targets = share * targets + (1 - share) * targets.flip(0)
        return inputs, targets
