"""An MLP as one function that keeps codes only, worked off in chunks of tokens."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mango.mole import pair, products
from mango.mole.activations import hidden
from mango.mole.deferred import Deferred, Pending, Read, places
from mango.mole.layer import Layer, chunks, unflatten
from mango.mole.linear import adopt, compute_dtype
from mango.mole.recognise import Pattern
from mango.mole.stores import Saved, load, save
from mango.products import without_autocast


class MoleMLP(nn.Module):
    r"""down(f(up(x))) or down(f(gate(x)) ∘ up(x)), whose output is exact (but with ``matmul="fp8"``) and whose backward pass reads codes.

    Between two linear layers the chain rule needs the hidden layer h, for the gradient of ``down``, and its partial derivatives by what
    comes out of the first layers. Every gradient is linear in each of them and in the input, so unbiased codes drawn independently give
    unbiased gradients, of the weights and of the input, whatever f is. That is ``hidden="codes"``. ``hidden="recompute"`` keeps the code
    of the input alone and computes the rest again from it: what the MLP needs then does not grow with the hidden layer nor, with
    ``chunk``, with the number of tokens, but the rounding of the input passes through f, which a coarse code makes felt.

    One weight's gradient is alive at a time: the backward pass leaves the operands, and autograd accumulates each gradient, and a fused
    step uses it up, before the next is made (see mango.mole.deferred). With several chunks the sums of all weights grow side by side,
    because one at a time would take as many backward passes as there are weights.

    Args:
        original: the module it stands for; its linear layers stay its children, and their parameters are used.
        pattern: what it computes.
        layers: names, dials and state of the linear layers, in the pattern's order.
    """

    def __init__(self, original: nn.Module, pattern: Pattern, layers: list[Layer]) -> None:
        adopt(self, original)
        self.pattern, self.mole = pattern, layers

    def forward(self, x: Tensor) -> Tensor:  # (…, inputs) -> (…, outputs)
        weights = self.matrices()
        if not (torch.is_grad_enabled() and all(weight.requires_grad for weight in weights)):
            return self.__dict__["original"](x)
        biases = (self._linear(name)._parameters["bias"] for name in self._names())
        pending: Pending = {}
        stands = places(weights, pending)  # the weights themselves go in without gradients
        y: Tensor = _MLP.apply(x, self, compute_dtype(x), pending, *stands, *(weight.detach() for weight in weights), *biases)
        return y

    def matrices(self) -> list[Tensor]:
        """The weights, in the pattern's order."""
        return [self._linear(name).weight for name in self._names()]

    def _names(self) -> tuple[str, ...]:
        return (*self.pattern.inputs, self.pattern.output)

    def _linear(self, name: str) -> nn.Linear:
        linear = self._modules[name]
        assert isinstance(linear, nn.Linear)
        return linear

    def extra_repr(self) -> str:
        config = self.mole[0].config
        return f"{self.pattern.activation}, store={config.store}, hidden={config.hidden}, gradient={config.gradient}"


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: MoleMLP, dtype: torch.dtype, pending: Pending, *inputs: Tensor | None) -> Tensor:
        layers, config, activation = mlp.mole, mlp.mole[0].config, mlp.pattern.activation
        params = inputs[len(layers) :]  # behind the stand-ins: weights, biases
        weights, biases = _cast(params, dtype)
        down = len(layers) - 1
        kept = [[part] for part in layers[0].save(x, dtype)]  # for each chunk: the input, then the hidden layer and its derivatives
        parts = chunks(x.detach(), config.chunk)
        for layer in layers[1:]:
            layer.kept = layer.replaced = 0
        for layer in layers[1:down]:
            layer.remember(parts)
        truth: list[Tensor] = []  # of the layer after the activation
        y = x.new_empty(sum(map(len, parts)), weights[down].shape[0], dtype=dtype)
        with without_autocast(x):
            for place, part, into in zip(kept, parts, chunks(y, config.chunk), strict=True):
                value, partials = _hidden(mlp, part.to(dtype), weights, biases)
                products.forward(value, weights[down], config.matmul, out=into)
                if (bias := biases[down]) is not None:
                    into.add_(bias)
                if config.hidden == "codes":
                    place += _keep(activation, value, partials, layers)
                if layers[down].compared:
                    truth.append(value)
        layers[down].remember(truth)
        saved = [one for place in kept for one in place]
        ctx.save_for_backward(*params, *(tensor for one in saved for tensor in one.tensors))
        ctx.mlp, ctx.dtype, ctx.pending, ctx.input, ctx.forms = mlp, dtype, pending, (x.shape, x.dtype), [one.form for one in saved]
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        mlp: MoleMLP = ctx.mlp
        layers, config, dtype = mlp.mole, mlp.mole[0].config, ctx.dtype
        count, down = len(layers), len(layers) - 1
        tensors = ctx.saved_tensors  # asked for once: activation checkpointing gives them once
        params, saved = tensors[: 2 * count], unflatten(tensors[2 * count :], ctx.forms)
        weights, biases = _cast(params, dtype)
        sums: list[Tensor | None] = [None] * count  # of the biases
        shape, given = ctx.input
        dx = dy.new_empty(dy.numel() // dy.shape[-1], shape[-1]) if ctx.needs_input_grad[0] else None
        parts = chunks(dy, config.chunk)
        each = len(saved) // len(parts)
        into = iter(chunks(dx, config.chunk)) if dx is not None else iter(())
        for place, weight in enumerate(mlp.matrices()):
            ctx.pending[place] = Deferred(layers[place].gradient(saved[0]), weight, sums=len(parts) > 1)
        for number, part in enumerate(parts):
            first, *rest = saved[number * each : (number + 1) * each]
            x = cache(partial(load, first))
            reads = _reads(rest) if rest else [held.detach for held in _flat(_hidden(mlp, x(), weights, biases))]
            ctx.pending[down].add(part, reads.pop(0))
            _sum(sums, down, part, params)
            dvalue = products.backward(part, weights[down], config.matmul)  # (tokens, hidden)
            target = next(into, None)
            for place in range(down):
                dpre = torch.mul(dvalue, reads.pop(0)(), out=dvalue if place == down - 1 else None)
                ctx.pending[place].add(dpre, x)
                _sum(sums, place, dpre, params)
                if target is not None:
                    products.backward(dpre, weights[place], config.matmul, out=target, add=place > 0)
        return None if dx is None else dx.view(shape).to(given), *(None,) * (3 + 2 * count), *sums


def _cast(params: tuple[Tensor | None, ...], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor | None]]:
    """Weights and biases in the dtype of the products."""
    half = len(params) // 2
    weights = [weight.to(dtype) for weight in params[:half] if weight is not None]
    return weights, [None if bias is None else bias.to(dtype) for bias in params[half:]]


def _hidden(mlp: MoleMLP, x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
    matmul = mlp.mole[0].config.matmul
    pre = [products.linear(x, weight, bias, matmul) for weight, bias in zip(weights[:-1], biases[:-1], strict=True)]
    return hidden(mlp.pattern.activation, pre)


def _keep(activation: str, value: Tensor, partials: list[Tensor], layers: list[Layer]) -> list[Saved]:
    """Codes of the hidden layer and of its derivatives: one for both where the activation has one (see mango.mole.pair)."""
    config = layers[0].config
    derivative = config.derivative_store or config.store
    if activation == "relu2" and config.store == derivative and config.store in ("int4", "int2"):
        saved = [pair.save(partials[0] * 0.5, config.block, layers[-1].name)]
        layers[-1].count(saved[0].nbytes, value.nbytes + partials[0].nbytes)
        return saved
    saved = []
    stores = (config.store, *(derivative for _ in partials))
    for layer, tensor, store in zip((layers[-1], *layers), (value, *partials), stores, strict=False):
        saved.append(save(tensor, store, config.block, layer.name))
        layer.count(saved[-1].nbytes, tensor.nbytes)
    return saved


def _reads(saved: list[Saved]) -> list[Read]:
    """The hidden layer and its derivatives, from their codes."""
    if saved[0].form.kind == pair.KIND:
        return [partial(pair.value, saved[0]), partial(pair.derivative, saved[0])]
    return [partial(load, one) for one in saved]


def _flat(found: tuple[Tensor, list[Tensor]]) -> list[Tensor]:
    return [found[0], *found[1]]


def _sum(sums: list[Tensor | None], place: int, b: Tensor, params: tuple[Tensor | None, ...]) -> None:
    """Add the gradient of one bias, if there is one."""
    bias = params[len(sums) + place]
    if bias is not None:
        total = b.sum(0).to(bias.dtype)
        previous = sums[place]
        sums[place] = total if previous is None else previous + total
