"""An MLP as one function that keeps codes only, worked off in chunks of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mango.mole import pair
from mango.mole.activations import hidden
from mango.mole.layer import Layer, chunks, unflatten
from mango.mole.linear import adopt, compute_dtype
from mango.mole.recognise import Pattern
from mango.mole.stores import Saved, load, save


class MoleMLP(nn.Module):
    r"""down(f(up(x))) or down(f(gate(x)) ∘ up(x)), whose output is exact and whose backward pass reads codes.

    Between two linear layers the chain rule needs the hidden layer h, for the gradient of ``down``, and its partial derivatives by what
    comes out of the first layers. Every gradient is linear in each of them and in the input, so unbiased codes drawn independently give
    unbiased gradients, of the weights and of the input, whatever f is. That is ``hidden="codes"``. ``hidden="recompute"`` keeps the code
    of the input alone and computes the rest again from it: what the MLP needs then does not grow with the hidden layer nor, with
    ``chunk``, with the number of tokens, but the rounding of the input passes through f, which a coarse code makes felt.

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
        y: Tensor = _MLP.apply(x, self, compute_dtype(x), *weights, *biases)
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
    def forward(ctx: Any, x: Tensor, mlp: MoleMLP, dtype: torch.dtype, *params: Tensor | None) -> Tensor:
        layers, config, activation = mlp.mole, mlp.mole[0].config, mlp.pattern.activation
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
        with torch.autocast(x.device.type, enabled=False):
            for place, part, into in zip(kept, parts, chunks(y, config.chunk), strict=True):
                value, partials = _hidden(activation, part.to(dtype), weights, biases)
                torch.mm(value, weights[down].mT, out=into)
                if (bias := biases[down]) is not None:
                    into.add_(bias)
                if config.hidden == "codes":
                    place += _keep(activation, value, partials, layers)
                if layers[down].compared:
                    truth.append(value)
        layers[down].remember(truth)
        saved = [one for place in kept for one in place]
        ctx.save_for_backward(*params, *(tensor for one in saved for tensor in one.tensors))
        ctx.mlp, ctx.dtype, ctx.input, ctx.forms = mlp, dtype, (x.shape, x.dtype), [one.form for one in saved]
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        mlp: MoleMLP = ctx.mlp
        layers, config, dtype = mlp.mole, mlp.mole[0].config, ctx.dtype
        count, down = len(layers), len(layers) - 1
        params, saved = ctx.saved_tensors[: 2 * count], unflatten(ctx.saved_tensors[2 * count :], ctx.forms)
        weights, biases = _cast(params, dtype)
        gradients = [layer.gradient(saved[0]) for layer in layers]
        sums: list[Tensor | None] = [None] * count  # of the biases
        shape, given = ctx.input
        dx = dy.new_empty(dy.numel() // dy.shape[-1], shape[-1]) if ctx.needs_input_grad[0] else None
        each = len(saved) // len(chunks(dy, config.chunk))
        into = iter(chunks(dx, config.chunk)) if dx is not None else iter(())
        for number, part in enumerate(chunks(dy, config.chunk)):
            first, *rest = saved[number * each : (number + 1) * each]
            x = load(first)
            value, *partials = _restore(rest) if rest else _flat(_hidden(mlp.pattern.activation, x, weights, biases))
            gradients[down].add(part, value)
            _sum(sums, down, part, params)
            dvalue = part @ weights[down]  # (tokens, hidden)
            del value
            target = next(into, None)
            for place in range(down):
                last = place == down - 1
                dpre = torch.mul(dvalue, partials[place], out=dvalue if last and config.gradient == "formed" else None)
                gradients[place].add(dpre, x)
                _sum(sums, place, dpre, params)
                if target is not None:
                    torch.mm(dpre, weights[place], out=target) if place == 0 else target.addmm_(dpre, weights[place])
        return (
            None if dx is None else dx.view(shape).to(given),
            None,
            None,
            *(gradient.finish(weight) for gradient, weight in zip(gradients, mlp.matrices(), strict=True)),
            *sums,
        )


def _cast(params: tuple[Tensor | None, ...], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor | None]]:
    """Weights and biases in the dtype of the products."""
    half = len(params) // 2
    weights = [weight.to(dtype) for weight in params[:half] if weight is not None]
    return weights, [None if bias is None else bias.to(dtype) for bias in params[half:]]


def _hidden(activation: str, x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
    return hidden(activation, [functional.linear(x, weight, bias) for weight, bias in zip(weights[:-1], biases[:-1], strict=True)])


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


def _restore(saved: list[Saved]) -> list[Tensor]:
    """The hidden layer and its derivatives."""
    return [*pair.load(saved[0])] if saved[0].form.kind == pair.KIND else [load(one) for one in saved]


def _flat(found: tuple[Tensor, list[Tensor]]) -> list[Tensor]:
    return [found[0], *found[1]]


def _sum(sums: list[Tensor | None], place: int, b: Tensor, params: tuple[Tensor | None, ...]) -> None:
    """Add the gradient of one bias, if there is one."""
    bias = params[len(sums) + place]
    if bias is not None:
        total = b.sum(0).to(bias.dtype)
        previous = sums[place]
        sums[place] = total if previous is None else previous + total
