"""torchvision's models for ImageNet: ResNet-50 and vision transformers of any width."""

from __future__ import annotations

from torch import nn

from mango.compat import torchvision
from mango.errors import ConfigError


def resnet50(classes: int) -> nn.Module:
    """ResNet-50 (He et al., arXiv:1512.03385): 25.6 M parameters for 1000 classes. Images (b, 3, h, w) of any size from 32 pixels."""
    return torchvision("ResNet-50").models.resnet50(num_classes=classes)


def vit(classes: int, size: int = 224, patch: int = 16, depth: int = 12, heads: int = 12, width: int = 768, ffn: int = 4) -> nn.Module:
    """A vision transformer (Dosovitskiy et al., arXiv:2010.11929); by default ViT-B/16: 86.6 M parameters for 1000 classes.

    Its head starts at zero, as there, so that a fresh model predicts every class alike.

    Args:
        size: height and width of the images in pixels.
        patch: of a patch.
        depth, heads, width, ffn: blocks, attention heads, channels, hidden channels as a multiple of these.

    Raises: ConfigError.
    """
    if size % patch:
        raise ConfigError.of("model.patch", patch, f"a divisor of model.size = {size}")
    if width % heads:
        raise ConfigError.of("model.heads", heads, f"a divisor of model.width = {width}")
    return torchvision("vision transformers").models.VisionTransformer(
        image_size=size, patch_size=patch, num_layers=depth, num_heads=heads, hidden_dim=width, mlp_dim=ffn * width, num_classes=classes
    )
