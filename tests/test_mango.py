"""Mango against float64 references, and its invariants."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mango import LayerPlan, Mango, codecs
from mango.draws import counter_generator, gaussian
from mango.errors import ConfigError
from mango.feedback.buffer import ErrorBuffer
from mango.stacked import Stacked
from mango.subspace import scout_alpha

EXACT = LayerPlan(basis_codec="fp32", moment_codec="fp32", error="gradient")


def matrix(rows: int = 64, cols: int = 96, seed: int = 0, *rest: int) -> nn.Parameter:
    return nn.Parameter(gaussian((rows, cols, *rest), (seed,)) * 0.1)


def push(optimizer: Mango, pairs: list[tuple[nn.Parameter, Tensor]]) -> None:
    for param, grad in pairs:
        param.grad = grad.clone()
    optimizer.step()


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # of the second there is no compiled update
def test_whole_caution_moves_nothing_against_its_gradient(maximize: bool, dtype: torch.dtype) -> None:
    moved = {}
    for caution in (0.0, 0.5, 1.0):
        param = nn.Parameter(torch.zeros(64, 80, dtype=dtype))
        optimizer = Mango([("w", param)], lr=0.1, plan=LayerPlan(rank=4, caution=caution), maximize=maximize)
        for step in range(3):
            before, grad = param.detach().clone(), gaussian((64, 80), (step,)).to(dtype)
            grad[0] = 0.0
            push(optimizer, [(param, grad)])
        moved[caution] = (param.detach() - before).double() * (1 if maximize else -1)
    agreement = moved[0.0] * grad.double()
    assert 0.05 < float((agreement < 0).double().mean()) < 0.5
    assert float((moved[1.0] * grad.double()).min()) >= 0.0
    if dtype == torch.float32:
        assert torch.allclose(moved[0.5], moved[0.0] * torch.where(agreement > 0, 1.5, 0.5), atol=1e-6)


def test_full_rank_is_adam_in_a_rotated_basis() -> None:
    # with the basis complete, H is captured whole: no residual, no error, and the first step is the sign of PᵀG; caution would bend it
    param = matrix(64, 80)
    start = param.detach().clone()
    optimizer = Mango([("w", param)], lr=0.5, plan=replace(EXACT, rank=64, caution=0.0))
    optimizer.observe()
    grad = gaussian((64, 80), (1,))
    push(optimizer, [(param, grad)])
    step = (start - param.detach()) / 0.5
    basis = optimizer.state[param]["basis.values"].view(64, 64)
    assert torch.allclose(basis.T @ step, (basis.T @ grad).sign(), atol=2e-3)
    assert torch.allclose(step.norm(), torch.tensor(64 * 80.0).sqrt(), rtol=1e-4)  # rotation keeps Adam's length
    found = optimizer.diagnostics()["w"]
    assert found["certified"] == 1.0 and abs(found["energy"] - 1) < 1e-5 and found["error_ratio"] < 1e-4


@pytest.mark.parametrize("decay", [1.0, 0.75])
@pytest.mark.parametrize("kind", ["gradient", "codec"])
def test_the_telescoped_sum_of_what_was_used(kind: str, decay: float) -> None:
    # sum C(H) = sum G - E_T in exact arithmetic; a codec loses what it rounds away at each step, and no more; decay, that share of it
    plan = replace(EXACT, rank=6, error=kind, error_codec="int8", error_decay=decay)
    param = matrix(64, 128)
    optimizer = Mango([("w", param)], plan=plan)
    optimizer.observe()
    total, used, lost = torch.zeros(64, 128), torch.zeros(64, 128), 0.0
    error = torch.zeros(64, 128)
    for step in range(10):
        grad = gaussian((64, 128), (3, step))
        push(optimizer, [(param, grad)])
        h = grad + decay * error
        basis = optimizer.state[param]["basis.values"].view(64, 6)
        sent = basis @ (basis.T @ h)
        total, used = total + grad - (1.0 - decay) * error, used + sent
        stack = optimizer._stacks.of[param]
        assert stack.error.store is not None
        error = stack.error.store.read()[0]
        lost += float((h - sent - error).norm())
        assert optimizer.diagnostics()["w"]["error_ratio"] == pytest.approx(float((h - sent).norm() / grad.norm()), rel=1e-3)
    assert float((total - used - error).norm()) <= lost + 1e-2
    assert (lost < 1e-3) == (kind == "gradient")


def test_the_error_survives_every_way_of_clearing_gradients() -> None:
    results = []
    for clear in ("none", "zero", "optimizer"):
        param = matrix()
        module = nn.Module()
        module.w = param
        optimizer = Mango(module.named_parameters(), plan=replace(EXACT, rank=4))
        for step in range(4):
            push(optimizer, [(param, gaussian((64, 96), (step,)))])
            if clear == "optimizer":
                optimizer.zero_grad()
            else:
                module.zero_grad(set_to_none=clear == "none")
        results.append(param.detach().clone())
        assert optimizer.state[param]["error.values"].abs().sum() > 0
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("error, scouts, reached", [("none", 0, False), ("gradient", 1, True), ("codec", 1, True)])
def test_kept_error_reaches_what_truncation_never_steps(error: str, scouts: int, reached: bool) -> None:
    # a steady gradient of which a rank-4 basis holds the four large directions; the other 60 are a tenth as large. Hardly any of them
    # is stepped without kept error
    grad = torch.diag(torch.tensor([10.0] * 4 + [1.0] * 60))
    param = nn.Parameter(torch.zeros(64, 64))
    optimizer = Mango([param], lr=0.01, plan=replace(EXACT, rank=4, scouts=scouts, residual=False, error=error))
    for step in range(90):
        push(optimizer, [(param, grad)])
        if step == 9:  # by now the basis has converged
            param.data.zero_()
    moved = float((param.detach().diagonal()[4:] < -0.005).float().mean())
    assert moved > 0.8 if reached else moved < 0.4


@pytest.mark.parametrize("shape", [(96, 128), (512, 512), (1100, 512)])
@pytest.mark.parametrize("plan", [{}, {"error": "none"}, {"error": "none", "scaling": "column"}, {"error": "none", "power": "sampled"}])
@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-2])
def test_what_is_left_of_a_gradient_of_low_rank_is_not_stepped_further_than_the_rest(
    shape: tuple[int, int], plan: dict[str, str], noise: float
) -> None:
    """Nearly nothing but rounding, scaled up to the size of what is captured at most; and nothing at all at first."""
    param = nn.Parameter(torch.zeros(shape))
    optimizer = Mango([("w", param)], lr=1.0, plan={"rank": 12, "caution": 0.0, **plan})
    for step in range(6):
        param.grad = gaussian((shape[0], 4), (1, step)) @ gaussian((4, shape[1]), (2, step)) + noise * gaussian(shape, (3, step))
        if step == 0:
            param.grad.zero_()
        before = param.detach().clone()
        optimizer.step()
        moved = float((param.detach() - before).square().mean().sqrt())
        assert moved <= 1.5 and (moved == 0.0) == (step == 0)


@pytest.mark.parametrize("factor, expected", [(None, 1.0), ("int8", codecs.get("int8").alpha())])
@pytest.mark.parametrize("power", ["full", "sampled", "half"])
def test_diagnostics(factor: str | None, expected: float, power: str) -> None:
    one, two, small = matrix(), matrix(seed=1), nn.Parameter(torch.zeros(10))
    plan = LayerPlan(rank=8, scouts=2, factor_codec=factor, power=power)
    optimizer = Mango([("one", one), ("two", two), ("small", small)], plan=plan)
    basis = {"full": scout_alpha(64, 8, 2), "sampled": scout_alpha(64, 8, 2) / 4, "half": 2 / 64}[power]
    push(optimizer, [(one, gaussian((64, 96), (2,))), (two, gaussian((64, 96), (3,))), (small, torch.ones(10))])
    assert optimizer.diagnostics() == {}
    optimizer.observe(True)
    for step in range(30):
        push(optimizer, [(one, gaussian((64, 96), (2, step))), (two, gaussian((64, 96), (3, step)))])
        found = optimizer.diagnostics()
        assert set(found) == {"one", "two"}
        for values in found.values():
            assert set(values) == {"certified", "measured", "energy", "drift", "error_ratio", "norm", "cosine", "variance"}
            assert values["norm"] == pytest.approx((64 * 96) ** 0.5, rel=0.1)
            assert -1 <= values["cosine"] <= 1
            assert 0 <= values["variance"] <= 1
            assert values["certified"] == pytest.approx(basis * expected)
            assert values["certified"] <= values["measured"] <= values["energy"] + 1e-5 <= 1 + 2e-5
            assert 0 <= values["drift"] <= 1
    if power != "half":  # half a step from the momentum finds the directions in which it agrees with the gradient
        assert all(values["variance"] > 0.1 for values in found.values()), "independent gradients disagree"
    optimizer.observe(False)
    push(optimizer, [(one, torch.ones(64, 96))])
    assert optimizer.diagnostics() == {}


def test_gradients_that_repeat_have_no_variance_and_follow_the_momentum() -> None:
    param, gradient = matrix(), gaussian((64, 4), (1,)) @ gaussian((4, 96), (2,))
    optimizer = Mango([("w", param)], plan=LayerPlan(rank=8, moment_codec="fp32", error="none"))
    optimizer.observe()
    for _ in range(5):
        push(optimizer, [(param, gradient)])
    found = optimizer.diagnostics()["w"]
    assert found["variance"] < 0.02
    assert found["cosine"] > 0.99


def test_plans_without_scouts_certify_nothing() -> None:
    param = matrix()
    optimizer = Mango([("w", param)], plan=LayerPlan(rank=8, scouts=0))
    optimizer.observe()
    push(optimizer, [(param, torch.ones(64, 96))])
    assert optimizer.diagnostics()["w"]["certified"] == 0.0


def test_batched_layers_step_as_they_would_alone() -> None:
    together = [matrix(seed=seed) for seed in range(3)]
    grads = [[gaussian((64, 96), (seed, step)) for seed in range(3)] for step in range(3)]
    plan = replace(LayerPlan(), rank=8, scouts=0)  # scouts and the first basis depend on a layer's place in its stack
    optimizer = Mango(together, plan=plan)
    for step in range(3):
        push(optimizer, list(zip(together, grads[step], strict=True)))
    assert len({id(stack) for stack in optimizer._stacks.of.values()}) == 1
    alone = matrix(seed=0)
    single = Mango([alone], plan=plan)
    draws = torch.randn(3, 64, 8, generator=counter_generator((0, 1, 0)))[:1]
    assert torch.equal(draws, torch.randn(1, 64, 8, generator=counter_generator((0, 1, 0))))  # so the first layer has the same start
    for step in range(3):
        push(single, [(alone, grads[step][0])])
    assert torch.allclose(alone, together[0], atol=1e-5)


@pytest.mark.parametrize("fuse", [False, True])
def test_a_step_within_autocast_is_the_step_without(fuse: bool) -> None:
    """Autocast is for the model: torch's optimizers multiply nothing that it would round, and ours does."""
    weights = []
    for enabled in (False, True):
        param = matrix()
        optimizer = Mango([param], lr=1e-2, fuse_backward=fuse)
        for step in range(3):
            optimizer.zero_grad()
            loss = (param * gaussian((64, 96), (step,))).sum()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss.backward()
                optimizer.step()
        weights.append(param.detach())
    assert torch.equal(*weights)


def test_large_layers_are_not_stacked_beyond_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mango.optim.stacks.STACK_VALUES", 2 * 64 * 96)
    params = [matrix(seed=seed) for seed in range(5)]
    optimizer = Mango(params)
    push(optimizer, [(param, torch.ones(64, 96)) for param in params])
    assert sorted(stack.layers for stack in set(optimizer._stacks.of.values())) == [1, 2, 2]


@pytest.mark.parametrize(
    ("plan", "matmul", "most"),
    [
        ({}, "bfloat16", 8),
        ({"error": "none"}, "bfloat16", 8),
        ({"error": "gradient"}, "bfloat16", 2),
        ({"error_codec": "int8"}, "bfloat16", 2),
        ({}, "int8", 2),
        ({}, "float32", 2),
    ],
)
def test_stacks_of_which_bfloat16_is_held_alone_are_larger(
    plan: dict[str, str], matmul: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mango.optim.stacks.STACK_VALUES", 2 * 64 * 96)
    params = [matrix(seed=seed) for seed in range(8)]
    optimizer = Mango(params, plan=plan, matmul=matmul)
    push(optimizer, [(param, torch.ones(64, 96)) for param in params])
    assert {stack.layers for stack in optimizer._stacks.of.values()} == {most}


def test_bf16_parameters_move_with_float32_state() -> None:
    param, exact = nn.Parameter(torch.zeros(64, 96, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(64, 96))
    one, two = Mango([param], lr=0.1), Mango([exact], lr=0.1)
    for step in range(3):
        grad = gaussian((64, 96), (step,)).bfloat16()
        push(one, [(param, grad)])
        push(two, [(exact, grad.float())])
    assert param.dtype == torch.bfloat16
    assert float((param.detach().float() - exact.detach()).abs().max()) < 0.02


@pytest.mark.parametrize("error", ["none", "codec"])
def test_columns_that_die_do_not_poison_the_layer(error: str) -> None:
    weight = matrix()
    optimizer = Mango([("w", weight)], lr=0.01, plan=LayerPlan(rank=32, error=error))
    steady = gaussian((*weight.shape, 1), (0,))[..., 0]  # every entry of Adam's direction comes to 1 or -1
    for step in range(20):
        weight.grad = steady.clone()
        if step >= 10:  # a unit that stopped firing: momentum is left, the gradient is exactly zero
            weight.grad[:, :7] = 0.0
            weight.grad[:5] = 0.0
        optimizer.step()
        assert torch.isfinite(weight).all()


def test_large_but_finite_gradients_are_not_mistaken_for_infinite_ones() -> None:
    param = matrix()
    optimizer = Mango([param])
    push(optimizer, [(param, torch.full((64, 96), 1e18))])
    assert bool(param.isfinite().all())


@pytest.mark.parametrize("codec, shape", itertools.product(codecs.REGISTRY, [(5, 7), (65, 130)]))
def test_a_new_stack_holds_what_zeros_are_encoded_as(codec: str, shape: tuple[int, ...]) -> None:
    stack = Stacked(codec, 3, shape, torch.device("cpu"))
    whole = stack.codec.encode(torch.zeros(3, stack.numel + stack.padding), generator=counter_generator((1,)))
    assert (stack.packed.kind, stack.packed.shape, stack.packed.dtype) == (whole.kind, whole.shape, whole.dtype)
    assert stack.packed.numbers == whole.numbers and stack.packed.parts.keys() == whole.parts.keys()
    assert all(torch.equal(one, two) for one, two in zip(stack.packed.tensors(), whole.tensors(), strict=True))
    assert float(stack.read().abs().max()) == 0.0


@pytest.mark.parametrize("codec, shape", itertools.product(["fp32", "bf16", "int8", "nf4", "int4"], [(5, 7), (64,), (3, 3, 11)]))
def test_stacked_layers_do_not_share_blocks(codec: str, shape: tuple[int, ...]) -> None:
    stack = Stacked(codec, 3, shape, torch.device("cpu"))
    assert float(stack.read().abs().max()) == 0.0
    x = gaussian((3, *shape), (0,)) * torch.tensor([1.0, 1e-3, 1e3]).view(3, *[1] * len(shape))
    stack.write(x, generator=counter_generator((1,)))
    values, out = stack.read(), torch.empty(3, *shape)
    assert values.shape == x.shape and torch.equal(stack.read(out), values)
    assert float((values - x).flatten(1).norm(dim=1).div(x.flatten(1).norm(dim=1)).max()) < 0.25  # each by its own scale
    views = [part[1].clone() for part in stack.parts().values()]
    stack.write(torch.cat([x[:1] * 7, x[1:2], x[2:] * 7]), generator=counter_generator((1,)))
    if not stack.codec.stochastic:
        assert all(torch.equal(view, part[1]) for view, part in zip(views, stack.parts().values(), strict=True))
    assert stack.nbytes == sum(part.nbytes for part in stack.parts().values())


def test_error_buffer_kinds() -> None:
    grads = [gaussian((4, 16), (i,)) for i in range(2)]
    device = torch.device("cpu")
    for kind in ("none", "gradient"):
        buffer = ErrorBuffer(kind, "nf4", 2, (4, 16), device)
        out = torch.empty(2, 4, 16)
        assert torch.equal(buffer.compensate(grads, out), torch.stack(grads))
        buffer.keep(out)
        expected = torch.stack(grads) * (-1 if kind == "none" else 0)
        assert torch.allclose(buffer.compensate(grads, out, -1.0), expected, atol=1e-6)
        assert torch.allclose(buffer.compensate(grads, out, -1.0, 0.75), expected - 0.25 * torch.stack(grads) * (kind != "none"), atol=1e-6)
    with pytest.raises(ConfigError, match=r"error = 'sometimes' is not legal: one of none, gradient, codec"):
        ErrorBuffer("sometimes", "nf4", 1, (4, 4), device)


@pytest.mark.parametrize("error", ["codec", "none"])
@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
def test_bfloat16_products_differ_by_rounding_alone(error: str, shape: tuple[int, int]) -> None:
    weights = {}
    for matmul in ("float32", "bfloat16"):
        param = matrix(*shape)
        optimizer = Mango([("w", param)], lr=0.01, plan=LayerPlan(rank=12, error=error), matmul=matmul)
        optimizer.observe()
        steady = gaussian(shape, (1,))
        for step in range(5):
            push(optimizer, [(param, steady + 0.1 * gaussian(shape, (2, step)))])
        weights[matmul] = param.detach().clone()
        assert (optimizer.diagnostics()["w"]["certified"] == 0.0) == (matmul == "bfloat16")
    start = matrix(*shape).detach()
    moved, apart = weights["float32"] - start, weights["float32"] - weights["bfloat16"]
    assert float(apart.norm() / moved.norm()) < 0.15
    with pytest.raises(ConfigError, match="matmul = 'tf32' is not legal"):
        Mango([matrix()], matmul="tf32")


# ---------------------------------------------------------------- shapes


def test_experts_are_stepped_as_matrices_of_their_own() -> None:
    stack = nn.Parameter(gaussian((3, 64, 96), (0,)))
    alone = [nn.Parameter(stack.detach()[part].clone()) for part in range(3)]
    plan = LayerPlan(rank=8, scouts=0)
    together, apart = Mango([("experts", stack)], lr=0.01, plan=plan), Mango(alone, lr=0.01, plan=plan)
    steady = gaussian((3, 64, 96), (1,))
    for step in range(3):
        push(together, [(stack, steady + 0.1 * step)])
        push(apart, [(param, steady[part] + 0.1 * step) for part, param in enumerate(alone)])
    bases = together.state[stack]["basis.values"].view(3, 64, 8).float()
    assert float((bases.mT @ bases - torch.eye(8)).abs().max()) < 0.02
    assert together.nbytes() == apart.nbytes()
    # the scouts of the first step differ, so the bases do too; the steps are as long
    assert float((stack.detach() - steady).norm()) > 0
    moved = [float((stack.detach()[part] - gaussian((3, 64, 96), (0,))[part]).norm()) for part in range(3)]
    moved_alone = [float((param.detach() - gaussian((3, 64, 96), (0,))[part]).norm()) for part, param in enumerate(alone)]
    assert moved == pytest.approx(moved_alone, rel=0.1)
    again = Mango([("experts", nn.Parameter(stack.detach().clone()))], lr=0.01, plan=plan)
    again.load_state_dict(together.state_dict())
    twin = again.param_groups[0]["params"][0]
    push(together, [(stack, steady)])
    push(again, [(twin, steady)])
    assert torch.equal(stack, twin)
    window = Mango([nn.Parameter(torch.zeros(64, 64, 3))])  # a one-dimensional convolution folds
    push(window, [(window.param_groups[0]["params"][0], torch.ones(64, 64, 3))])
    assert window.state[window.param_groups[0]["params"][0]]["basis.values"].numel() == 64 * 8


def test_scouts_do_not_depend_on_which_other_parameters_have_gradients() -> None:
    results = []
    for with_other in (False, True):
        one, two = matrix(seed=0), matrix(seed=1)
        optimizer = Mango([("one", one), ("two", two)], plan=LayerPlan(rank=8))
        push(optimizer, [(two, gaussian((64, 96), (1,)))] + ([(one, gaussian((64, 96), (2,)))] if with_other else []))
        results.append(two.detach().clone())
    assert torch.allclose(results[0], results[1], atol=1e-6)
