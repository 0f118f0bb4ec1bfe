"""What can be planned for: a module on the meta device, how to call it, and which of its sizes may grow."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mango.compat import torchvision, transformers
from mango.errors import ConfigError
from mango.models.gpt import GPT
from mango.models.llama import SIZES as LLAMA
from mango.models.llama import configuration

VISION = {"resnet50": "resnet50", "vit-b16": "vit_b_16"}
NAMES = ("nanochat-d<depth>", *(f"llama-{size}" for size in LLAMA), *VISION, "a Hugging Face config.json")
LANGUAGE_ENDS = ("embed", "lm_head", r"^head\.")  # kept on AdamW by Muon's and GaLore's authors
VISION_ENDS = ("fc", "conv1", "heads", "conv_proj")


@dataclass(frozen=True)
class Target:
    """A model to plan for.

    Attributes:
        name: for titles.
        module: on any device, its sizes alone are used.
        loss: (model as a function, batch, size, dtype of the weights) -> scalar loss, on meta inputs; size is the sequence length, or the
            side of an image.
        axis: "sequence" where longer inputs are wanted, "batch" where the input's size is fixed.
        size: the fixed size of ``axis="batch"``; the default sequence length otherwise.
        ends: regular expressions for parameters that Muon and GaLore leave to AdamW.
    """

    name: str
    module: nn.Module
    loss: Callable[[Callable[..., Any], int, int, torch.dtype], Tensor]
    axis: str = "sequence"
    size: int = 1024
    ends: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.axis not in ("sequence", "batch"):
            raise ConfigError.of("axis", self.axis, "sequence or batch")

    @property
    def parameters(self) -> int:
        """Values of all parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def patterns(self) -> list[str]:
        """Those of ``ends`` that this model has."""
        names = [name for name, parameter in self.module.named_parameters() if parameter.requires_grad]
        return [pattern for pattern in self.ends if any(re.search(pattern, name) for name in names)]


def target(model: str | Target) -> Target:
    """A model by name, or by the path of a Hugging Face ``config.json``, built on the meta device.

    Raises: ConfigError for a name or a configuration that is not known. MissingExtra where torchvision or transformers is needed.
    """
    if isinstance(model, Target):
        return model
    name = model.lower()
    if match := re.fullmatch(r"(?:nanochat-?)?d(\d+)", name):
        return _nanochat(int(match[1]))
    if match := re.fullmatch(r"llama-?(\w+)", name):
        if match[1] in LLAMA:
            return _llama(match[1])
    elif name in VISION:
        return _vision(name)
    elif Path(model).suffix == ".json" or Path(model).is_dir():
        return _hugging_face(Path(model))
    raise ConfigError.of("model", model, "one of " + ", ".join(NAMES))


@contextmanager
def _on_meta() -> Iterator[None]:
    with torch.device("meta"):
        yield


def _nanochat(depth: int) -> Target:
    """Karpathy's nanochat by its depth, with 65536 tokens."""
    with _on_meta():
        module = GPT(65536, depth=depth)

    def loss(model: Callable[..., Any], batch: int, size: int, dtype: torch.dtype) -> Tensor:
        return model(_tokens(batch, size), targets=_tokens(batch, size))

    return Target(f"nanochat d{depth}", module, loss, size=2048, ends=LANGUAGE_ENDS)


def _llama(size: str) -> Target:
    return causal(f"LLaMA {size.upper()}", configuration(size, vocabulary=32000))


def _hugging_face(path: Path) -> Target:
    file = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError.of("model", str(file), f"a JSON file ({error})") from None
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise ConfigError.of("model", str(file), "a Hugging Face config.json, which names its model_type")
    library = transformers("a Hugging Face model")
    try:
        config = library.AutoConfig.for_model(**fields)
        return causal(file.parent.name or fields["model_type"], config)
    except (ValueError, KeyError) as error:
        raise ConfigError.of(
            "model", str(file), f"a causal language model that transformers knows ({str(error).splitlines()[0]})"
        ) from None


def causal(name: str, config: Any) -> Target:
    """A causal language model of transformers, from its configuration object."""
    library = transformers("a Hugging Face model")
    # transformers looks at values to find that SDPA needs no mask, and the meta device has none: under a name of our own no mask is made
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    library.AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)
    config.use_cache = False
    with _on_meta():
        module = library.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa_without_mask")
    module.train()

    def loss(model: Callable[..., Any], batch: int, size: int, dtype: torch.dtype) -> Tensor:
        return model(input_ids=_tokens(batch, size), labels=_tokens(batch, size)).loss

    return Target(name, module, loss, size=min(2048, getattr(config, "max_position_embeddings", 2048)), ends=LANGUAGE_ENDS)


def _vision(name: str) -> Target:
    torchvision(name)
    from torchvision import models

    with _on_meta():
        module = getattr(models, VISION[name])()
    module.train()

    def loss(model: Callable[..., Any], batch: int, size: int, dtype: torch.dtype) -> Tensor:
        images = torch.empty(batch, 3, size, size, device="meta", dtype=dtype)
        return nn.functional.cross_entropy(model(images), torch.empty(batch, dtype=torch.long, device="meta"))

    return Target({"resnet50": "ResNet-50", "vit-b16": "ViT-B/16"}[name], module, loss, axis="batch", size=224, ends=VISION_ENDS)


def _tokens(batch: int, size: int) -> Tensor:
    return torch.empty(batch, size, dtype=torch.long, device="meta")
