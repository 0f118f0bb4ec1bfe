"""Which parameters of a model Mango compresses: parameter groups for any training loop, and a factory for transformers' Trainer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mango.errors import ConfigError
from mango.optim.muon import Muon
from mango.optim.plan import LayerPlan
from mango.optim.split import split

Group = dict[str, Any]


def param_groups(
    model: nn.Module,
    target_modules: Sequence[str] | str | None = None,
    plan: LayerPlan | Mapping[str, Any] = LayerPlan(),  # noqa: B008  (frozen)
    exclude: Sequence[str] = (),
    weight_decay: float | None = None,
    **options: Any,
) -> list[Group]:
    """Parameter groups for Mango: (name, parameter) pairs of the matrices to compress, and of the rest, which plain AdamW steps.

    Args:
        model: whose trainable parameters are taken; a tied weight once.
        target_modules: regular expressions; a matrix is compressed if one is found in its module's name ("q_proj", "mlp"). None = every
            matrix of at least 4096 values.
        plan: of the compressed matrices.
        exclude: regular expressions of parameter names that are not compressed, such as embeddings.
        weight_decay: for parameters of two or more dimensions; the others (biases, norms) get 0. None = what Mango is told, for all.
        options: any other option of Mango, for all groups.

    Raises:
        ConfigError: for a pattern that is not a regular expression or that nothing matches, or a plan that is not legal.
    """
    matrices, rest = split(model, exclude)
    if target_modules is not None:
        patterns = [_compiled(pattern) for pattern in ([target_modules] if isinstance(target_modules, str) else target_modules)]
        for pattern in patterns:
            if not any(pattern.search(_module(name)) for name, _ in matrices):
                legal = "a regular expression that is found in the name of a module with a matrix"
                raise ConfigError.of("target_modules", pattern.pattern, legal)
        chosen = {name for name, _ in matrices if any(pattern.search(_module(name)) for pattern in patterns)}
        rest = [pair for pair in [*matrices, *rest] if pair[0] not in chosen]
        matrices = [pair for pair in matrices if pair[0] in chosen]
    groups: list[Group] = [{"params": matrices, "plan": LayerPlan.of(plan), **options}, {"params": rest, "plan": None, **options}]
    if weight_decay is not None:
        groups[0]["weight_decay"] = weight_decay
        flat = [pair for pair in rest if pair[1].ndim < 2]
        groups[1] |= {"params": [pair for pair in rest if pair[1].ndim >= 2], "weight_decay": weight_decay}
        groups.append({"params": flat, "plan": None, "weight_decay": 0.0, **options})
    return [group for group in groups if group["params"]]


class MuonMango:
    """A factory that splits a model: the targeted hidden matrices go to Muon, everything else to Mango, with one state and one step.

    As transformers' Trainer calls it, ``optimizer_cls_and_kwargs=(MuonMango, {...})``, or by hand, ``MuonMango()(model, lr=1e-3)``.
    """

    def __call__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        muon_lr: float = 2e-2,
        target_modules: Sequence[str] | str | None = None,
        exclude: Sequence[str] = (),
        weight_decay: float = 0.0,
        plan: LayerPlan | Mapping[str, Any] = LayerPlan(),  # noqa: B008  (frozen)
        **options: Any,
    ) -> torch.optim.Optimizer:
        """The optimizer.

        Args:
            lr, muon_lr: of Mango's and of Muon's parameters.
            target_modules, exclude: which matrices Muon steps, see ``param_groups``; what is excluded (embeddings, heads) Mango steps.
            weight_decay: decoupled, for both.
            plan, options: Mango's.

        Raises: ConfigError as ``param_groups`` and Mango do.
        """
        from mango.optim.chain import Chain, Part
        from mango.optim.mango import Mango

        groups = param_groups(model, target_modules, plan, exclude)
        muon = [param for group in groups if group["plan"] is not None for _, param in group["params"]]
        taken = {id(param) for param in muon}
        left = [param for param in model.parameters() if param.requires_grad and id(param) not in taken]
        return Chain(
            [
                Part(lambda inner: Muon(inner, lr=muon_lr, weight_decay=weight_decay), [{"params": muon}], fold=True),
                Part(
                    lambda inner: Mango(inner, lr=lr, weight_decay=weight_decay, plan=plan, **options),
                    [{"params": left}],
                ),
            ]
        )


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError.of("target_modules", pattern, f"a regular expression ({error})") from None


def _module(name: str) -> str:
    return name.rpartition(".")[0]
