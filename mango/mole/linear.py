"""A linear layer that keeps a code of its input instead of the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mango.mole import products
from mango.mole.layer import Layer, chunks, unflatten
from mango.mole.stores import Saved, load
from mango.products import autocasts, without_autocast


class MoleLinear(nn.Linear):
    """y = x Wᵀ + bias, whose backward pass reads the input from its code. The output and the input's gradient are exact, but with
    ``matmul="fp8"``.

    It takes the place of a linear layer and shares its parameters, buffers and hooks, so that optimizers and checkpoints see no difference.

    Args:
        original: the layer it stands for.
        layer: its name, dials and state.
        casts: whether the original takes its weight in the input's dtype, as nanochat's Linear does; nn.Linear refuses instead.
    """

    def __init__(self, original: nn.Linear, layer: Layer, casts: bool = False) -> None:
        adopt(self, original)
        self.mole, self.casts = layer, casts

    def forward(self, x: Tensor) -> Tensor:  # (…, in_features) -> (…, out_features)
        dtype = compute_dtype(x)
        if not (self.weight.requires_grad and torch.is_grad_enabled()):  # then nothing needs the input
            weight = self.weight.to(dtype) if self.casts else self.weight
            return functional.linear(x, weight, self.bias if self.bias is None or not self.casts else self.bias.to(dtype))
        if dtype != self.weight.dtype and dtype == x.dtype and not self.casts:
            return functional.linear(x, self.weight, self.bias)  # which says what is wrong
        saved = self.mole.save(x, dtype)
        y: Tensor = _Linear.apply(x, self.weight, self.bias, self, dtype, saved)
        return y

    def extra_repr(self) -> str:
        config = self.mole.config
        return f"{super().extra_repr()}, store={config.store}, gradient={config.gradient}"


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, module: MoleLinear, dtype: torch.dtype, saved: list[Saved]
    ) -> Tensor:
        ctx.save_for_backward(weight, *(tensor for part in saved for tensor in part.tensors))
        ctx.module, ctx.dtype, ctx.forms, ctx.input = module, dtype, [part.form for part in saved], x.dtype
        with without_autocast(x):
            return products.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), module.mole.config.matmul)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, *tensors = ctx.saved_tensors
        layer, saved = ctx.module.mole, unflatten(tensors, ctx.forms)
        dx = None
        if ctx.needs_input_grad[0]:
            b = dy.reshape(-1, dy.shape[-1])
            dx = products.backward(b, weight.to(ctx.dtype), layer.config.matmul).view(*dy.shape[:-1], weight.shape[1]).to(ctx.input)
        gradient = layer.gradient(saved[0])
        for one, b in zip(saved, chunks(dy, layer.config.chunk), strict=True):
            gradient.add(b, load(one))
        db = dy.reshape(-1, dy.shape[-1]).sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        return dx, gradient.finish(ctx.module.weight), db, None, None, None


def adopt(module: nn.Module, original: nn.Module) -> None:
    """Let ``module`` stand for ``original``: the same parameters, submodules, buffers and hooks, in the very same dictionaries."""
    module.__dict__.update(original.__dict__)
    module.__dict__["original"] = original  # not a submodule: names in a state_dict stay as they were


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a product with x is taken: autocast's where it is on."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) and x.dtype != torch.float64 else x.dtype
