"""Residual networks for 32x32 images (He et al., arXiv:1512.03385), from one that two CPU cores can train to ResNet-18."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from mango.errors import ConfigError

STEMS = {"conv": 1, "patch2": 2, "patch4": 4}  # pixels on a side that become channels before the first convolution


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation around an identity, or a 1x1 projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:  # (b, inputs, h, w) -> (b, outputs, h / stride, w / stride)
        out = functional.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        return functional.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """Stages of basic blocks; the width doubles and the resolution halves from stage to stage.

    Args:
        classes: outputs.
        width: channels of the first stage.
        blocks: blocks in each stage.
        stem: "conv" = a 3x3 convolution at full resolution; "patch2" and "patch4" = 2x2 or 4x4 pixels become 12 or 48 channels first,
            which cuts the arithmetic of all that follows to a quarter or a sixteenth.

    Raises: ConfigError.
    """

    def __init__(self, classes: int, width: int = 32, blocks: Sequence[int] = (1, 1, 1), stem: str = "conv") -> None:
        super().__init__()
        if stem not in STEMS:
            raise ConfigError.of("model.stem", stem, "one of " + ", ".join(STEMS))
        if width < 1 or not blocks or min(blocks) < 1:
            raise ConfigError.of(
                "model.width and model.blocks", (width, list(blocks)), "a width >= 1 and at least one stage of at least one block each"
            )
        self.patch = STEMS[stem]
        self.stem = nn.Conv2d(3 * self.patch**2, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        stages, inputs = [], width
        for stage, count in enumerate(blocks):
            outputs = width * 2**stage
            stages += [
                BasicBlock(inputs if block == 0 else outputs, outputs, 2 if stage > 0 and block == 0 else 1) for block in range(count)
            ]
            inputs = outputs
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:  # (b, 3, h, w) -> (b, classes)
        x = functional.pixel_unshuffle(x, self.patch) if self.patch > 1 else x
        x = functional.relu(self.norm(self.stem(x)))
        return self.head(self.blocks(x).mean(dim=(2, 3)))


def resnet18(classes: int) -> ResNet:
    """ResNet-18 with the 3x3 stem that CIFAR-10 needs: 11.2 M parameters."""
    return ResNet(classes, width=64, blocks=(2, 2, 2, 2), stem="conv")
