"""Models that the experiments train. ``mango.models.get("resnet", classes=10, width=32, blocks=[1, 1, 1], stem="patch2")``."""

from mango.registry import Registry

REGISTRY = Registry(
    "model",
    {
        "gpt": "mango.models.gpt:GPT",
        "llama": "mango.models.llama:Llama",
        "resnet": "mango.models.resnet:ResNet",
        "resnet18": "mango.models.resnet:resnet18",
        "resnet50": "mango.models.vision:resnet50",
        "vit": "mango.models.vision:vit",
    },
)
get = REGISTRY.get

__all__ = ["REGISTRY", "get"]
