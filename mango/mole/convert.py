"""Turn a model's linear layers into MoleGrad's, in place, and back."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from mango.errors import ConfigError
from mango.mole import norm, products, recognise
from mango.mole.config import TARGETS, MoleConfig
from mango.mole.layer import Layer
from mango.mole.linear import MoleLinear
from mango.mole.mlp import MoleMLP
from mango.mole.stores import Shared
from mango.mole.watch import Sink

FFN = re.compile(r"(^|[._])(mlp|ffn|ff|feedforward|feed_forward|experts?)([._]|$|\d)", re.IGNORECASE)
ATTENTION = re.compile(r"(^|[._])(attn|attention|self_attn|self_attention|cross_attn)([._]|$|\d)", re.IGNORECASE)
PROBE_TOKENS = 4


@dataclass
class Report:
    """What a conversion did.

    Attributes:
        converted: module name -> what it became.
        skipped: name of a linear-like module that was left alone -> why.
        layers: the converted matrices, in the model's order.
    """

    converted: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)

    def observe(self, sink: Sink | None) -> None:
        """Send the rows of diagnostics and comparisons of every layer to a sink, e.g. ``RunLog.write``; None = nowhere."""
        for layer in self.layers:
            layer.sink = sink

    def __str__(self) -> str:
        lines = [f"{name}: {what}" for name, what in self.converted.items()]
        return "\n".join(lines + [f"{name}: left alone, {why}" for name, why in self.skipped.items()])


def convert(model: nn.Module, config: MoleConfig) -> Report:
    """Convert the layers that ``config.targets`` names, in place.

    Parameters stay the same objects, so an optimizer made before or after holds them alike, and names in a state_dict do not change.
    A layer is converted when it is an nn.Linear, or a subclass whose own forward is seen, on a probe, to compute x Wᵀ + bias.

    Returns: what was converted, what was not, and why.

    Raises: ConfigError when nothing is converted, when the model holds converted layers already, or when a device lacks the units that
        ``config.matmul`` asks for.
    """
    if any(hasattr(module, "mole") for module in model.modules()):
        raise ConfigError.of("model", type(model).__name__, "a model without converted layers: revert(model) first")
    if config.matmul == "fp8":
        for device in {parameter.device for parameter in model.parameters()}:
            if not products.units(device):
                raise ConfigError.of("mole.matmul", "fp8", f"auto: {device} has no units for eight-bit floats")
    report, shared = Report(), Shared()
    tied = _tied(model)
    candidates: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        if not _linear_like(module) or not _targeted(name, module, config):
            continue
        why = _refused(name, module, config, tied)
        if why is not None:
            report.skipped[name] = why
        elif isinstance(module, nn.Linear):
            candidates[name] = module
    for name, module in list(model.named_modules()) if config.store != "sketch" else ():
        children = {f"{name}.{child}" for child, linear in module.named_children() if isinstance(linear, nn.Linear)}
        pattern = recognise.mlp(module) if module is not model and children and children <= candidates.keys() else None
        if pattern is not None:
            names = [f"{name}.{child}" for child in (*pattern.inputs, pattern.output)]
            layers = [_layer(each, candidates.pop(each), config, report, shared) for each in names]
            _replace(model, module, MoleMLP(module, pattern, layers))
            report.converted[name] = f"MLP with {pattern.activation}, {_dials(config)}, hidden {config.hidden}"
    for name, linear in candidates.items():
        layer = _layer(name, linear, config, report, shared)
        _replace(model, linear, MoleLinear(linear, layer, casts=type(linear).forward is not nn.Linear.forward))
        report.converted[name] = f"linear, {_dials(config)}"
    for name, module in list(model.named_modules()) if config.norms else ():
        parent = name.rpartition(".")[0]
        if norm.convertible(module) and any(other == parent or other.rpartition(".")[0] == parent for other in report.converted):
            _replace(model, module, norm.MoleNorm(module, shared))
            report.converted[name] = "norm that keeps its output"
    if not report.converted:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(report.skipped.items())[:4])
        raise ConfigError.of("mole.targets", config.targets, f"something that names convertible layers ({reasons or 'it names none'})")
    return report


def _layer(name: str, linear: nn.Linear, config: MoleConfig, report: Report, shared: Shared) -> Layer:
    report.layers.append(Layer(name, config, (linear.out_features, linear.in_features), len(report.layers), shared))
    return report.layers[-1]


def _dials(config: MoleConfig) -> str:
    return f"store {config.store}, gradient {config.gradient}"


def revert(model: nn.Module) -> None:
    """Undo ``convert``: the modules that stood there before, with the same parameters."""
    for module in list(model.modules()):
        original = module.__dict__.get("original")
        if original is not None:
            original.training = module.training
            _replace(model, module, original)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is a child: a shared module has several parents. Raises: ConfigError for the model itself."""
    found = False
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name], found = new, True
    if not found:
        raise ConfigError.of("model", type(old).__name__, "a module that holds the layers to convert")


def _linear_like(module: nn.Module) -> bool:
    """Also what looks like a linear layer but is not one (transformers' Conv1D), so that the report can say why it stays."""
    if isinstance(module, nn.Linear):
        return True
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def _targeted(name: str, module: nn.Module, config: MoleConfig) -> bool:
    if any(re.search(pattern, name) for pattern in config.exclude):
        return False
    targets = config.targets
    if not isinstance(targets, str):
        return bool(targets(name, module))
    if targets not in TARGETS:
        return re.search(targets, name) is not None
    attention = ATTENTION.search(name) is not None
    return {"all": True, "attention": attention, "ffn": FFN.search(name) is not None and not attention}[targets]


def _refused(name: str, module: nn.Module, config: MoleConfig, tied: dict[Tensor, list[str]]) -> str | None:
    """Why a module stays as it is; None when it can be converted."""
    if not isinstance(module, nn.Linear):
        return f"{type(module).__name__} is not an nn.Linear"
    if "weight" not in module._parameters:
        return "its weight is computed (a parametrization)"
    if not module.weight.requires_grad:
        return "its weight is frozen, so its input is not kept anyway"
    if module.in_features < config.min_features:
        return f"its {module.in_features} inputs are fewer than min_features = {config.min_features}"
    if config.matmul == "fp8" and any(size % products.MULTIPLE for size in module.weight.shape):
        return f"its weight is {tuple(module.weight.shape)}, and fp8 needs multiples of {products.MULTIPLE}"
    users = [user for user in tied[module.weight] if user != name]
    if users and config.gradient == "factored" and not config.fill_grad:
        return f"its weight is that of {users[0]} too, whose gradient is formed: factored gradients need fill_grad"
    if not _computes_linear(module):
        return f"the forward of {type(module).__name__} is not x Wᵀ + bias"
    return None


def _tied(model: nn.Module) -> dict[Tensor, list[str]]:
    """Names of the modules that hold each parameter; a module that is reached twice counts once."""
    found: dict[Tensor, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                found.setdefault(parameter, []).append(name)
    return found


@torch.no_grad()
def _computes_linear(module: nn.Linear) -> bool:
    """Whether a subclass with a forward of its own computes x Wᵀ + bias, with the weight in the input's dtype: seen on a few tokens."""
    if type(module).forward is nn.Linear.forward:
        return True
    weight = module.weight
    if weight.is_meta:
        return False
    x = torch.linspace(-1.0, 1.0, PROBE_TOKENS * module.in_features, device=weight.device, dtype=torch.float32).view(PROBE_TOKENS, -1)
    for dtype in dict.fromkeys((weight.dtype, torch.float32)):
        probe = x.to(dtype)
        try:
            found = module(probe)
        except RuntimeError:
            return False
        expected = functional.linear(probe, weight.to(dtype), None if module.bias is None else module.bias.to(dtype))
        if found.dtype != dtype or found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-3, atol=1e-5):
            return False
    return True
