"""LLaMA (arXiv:2302.13971) by transformers: the sizes of the GaLore papers from random weights, or any local checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mango.compat import transformers
from mango.errors import ConfigError

# Width, FFN width, layers, heads. From 9m on GaLore's configurations (arXiv:2403.03507, configs/llama_*.json), whose names count their
# 32 000 tokens twice, as embedding and head; micro is ours, for minutes on a CPU.
SIZES = {
    "micro": (64, 176, 2, 2),
    "9m": (128, 352, 4, 4),
    "60m": (512, 1376, 8, 8),
    "130m": (768, 2048, 12, 12),
    "350m": (1024, 2736, 24, 16),
    "1b": (2048, 5461, 24, 32),
    "7b": (4096, 11008, 32, 32),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Llama(nn.Module):
    """Tokens to the logits of the next token.

    Args:
        vocabulary: number of tokens of the data. A checkpoint may have more (padding), not fewer.
        size: one of ``SIZES``, from random weights; ignored with ``path``.
        path: folder in which transformers' ``save_pretrained`` left a LLaMA, whole or in shards. Nothing is downloaded.
        dtype: of the weights, "float32" or "bfloat16".

    Attributes:
        network: transformers' LlamaForCausalLM, or what ``mango.models.adapters`` made of it.

    Raises: ConfigError when the folder is absent, is not a LLaMA, lacks weights or has fewer tokens than the data. MissingExtra.
    """

    def __init__(self, vocabulary: int, size: str = "micro", path: str | None = None, dtype: str = "float32") -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise ConfigError.of("model.dtype", dtype, "one of " + ", ".join(DTYPES))
        if path is None:
            self.network: Any = transformers("a LLaMA").LlamaForCausalLM(configuration(size, vocabulary)).to(DTYPES[dtype])
        else:
            self.network = _loaded(Path(path), DTYPES[dtype])
            held = self.network.config.vocab_size
            if held < vocabulary:
                raise ConfigError.of(
                    "model.path", path, f"a checkpoint with at least the {vocabulary} tokens of the data's tokenizer; it has {held}"
                )

    def forward(self, tokens: Tensor) -> Tensor:  # (b, t) int64 -> (b, t, vocabulary)
        return self.network(input_ids=tokens, use_cache=False).logits


def configuration(size: str, vocabulary: int) -> Any:
    """transformers' LlamaConfig of one of ``SIZES``. Raises: ConfigError, MissingExtra."""
    if size not in SIZES:
        raise ConfigError.of("model.size", size, "one of " + ", ".join(SIZES))
    width, ffn, layers, heads = SIZES[size]
    return transformers("a LLaMA").LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        bos_token_id=None,  # of no use here; transformers' numbers may lie outside a small vocabulary
        eos_token_id=None,
    )


def tokenizer_of(path: str) -> Path | None:
    """The tokenizer that a checkpoint's folder brings, as the ``tokenizers`` library saves it; None when it brings none."""
    file = Path(path) / "tokenizer.json"
    return file if file.is_file() else None


def _loaded(folder: Path, dtype: torch.dtype) -> Any:
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError.of("model.path", str(folder), "a folder that holds config.json and weights, as save_pretrained writes them")
    try:
        kind = json.loads(file.read_text()).get("model_type")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ConfigError.of("model.path", str(folder), f"a folder whose config.json is a JSON object ({error})") from None
    if kind != "llama":
        raise ConfigError.of("model.path", str(folder), f"a LLaMA; its config.json says model_type = {kind!r}")
    library = transformers("a LLaMA")
    library.utils.logging.disable_progress_bar()
    try:
        network, report = library.LlamaForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=dtype, output_loading_info=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError.of("model.path", str(folder), f"a folder with a LLaMA's weights ({str(error).splitlines()[0]})") from None
    if missing := sorted(report["missing_keys"]):  # transformers would draw them at random
        raise ConfigError.of("model.path", str(folder), f"a whole checkpoint; it lacks {len(missing)} tensors, {missing[0]} first")
    return network
