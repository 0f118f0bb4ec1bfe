"""LoRA (arXiv:2106.09685) and QLoRA (arXiv:2305.14314): a frozen base beside small factors that train. By peft and bitsandbytes.

The backward pass of a frozen linear layer, dX = dY W, reads its weight and not its input, and autograd keeps none: there is nothing for
MoleGrad to compress there. The factors' own inputs are kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mango.compat import bitsandbytes, require
from mango.errors import ConfigError

if TYPE_CHECKING:
    from mango.models.llama import Llama

BASES = ("float32", "bfloat16", "nf4")


def adapt(model: Llama, rank: int = 8, alpha: float = 16.0, base: str = "float32") -> None:
    """Freeze a LLaMA and put factors beside every linear layer of its blocks; the model's ``state_dict`` is then the factors' alone.

    Args:
        model: changed in place.
        rank: columns of the factors.
        alpha: the factors' product is scaled by alpha / rank.
        base: how the blocks' frozen matrices are kept: "float32", "bfloat16", or "nf4" with twice quantised scales. Embedding, head and
            norms keep the model's type, as in QLoRA.

    Raises: ConfigError, MissingExtra.
    """
    if base not in BASES:
        raise ConfigError.of("lora.base", base, "one of " + ", ".join(BASES))
    peft = require("peft", extra="llama", purpose="LoRA")
    blocks = model.network.model.layers
    if base == "nf4":
        _quantise(blocks)
    elif base == "bfloat16":
        blocks.to(torch.bfloat16)
    # factors are in float32 whatever the base (peft's default), which is what AdamW needs
    model.network = peft.get_peft_model(model.network, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.register_state_dict_post_hook(lambda module, state, *_: _keep(state, trained))
    model.register_load_state_dict_post_hook(lambda module, found: _forgive(found.missing_keys, trained))


def _keep(state: dict[str, Any], trained: set[str]) -> None:
    for name in [name for name in state if name not in trained]:
        del state[name]


def _forgive(missing: list[str], trained: set[str]) -> None:
    """The base is not in a state that was saved: it comes from its own checkpoint."""
    missing[:] = [name for name in missing if name in trained]


def _quantise(blocks: nn.Module) -> None:
    """Every linear layer as bitsandbytes' four-bit one."""
    library = bitsandbytes("four-bit weights")
    for parent in list(blocks.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                device, dtype = child.weight.device, child.weight.dtype
                made = library.nn.Linear4bit(child.in_features, child.out_features, bias=False, compute_dtype=dtype, quant_type="nf4")
                # a CPU with bfloat16 units would evaluate in bfloat16 what it trains in float32, and takes multiples of 32 outputs only
                made.support_avx512bf16_for_cpu = False
                made.weight = library.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                setattr(parent, name, made.to(device))  # moving is what quantises
