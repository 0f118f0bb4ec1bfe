"""Every registered optimizer meets every contract; the split rule; the byte counts; the chain."""

from __future__ import annotations

import io
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mango import optim
from mango.draws import gaussian
from mango.errors import ConfigError
from mango.optim import Chain, Mango, build, split, state_nbytes

CUDA = ("pagedadamw8bit",)  # its package runs there alone
NAMES = sorted(name for name in optim.REGISTRY if name not in CUDA)
RATES = {"adafactor": 0.1, "sgd": 0.01, "muon": 0.05, "galore": 0.1, "galore8bit": 0.1, "adarankgrad": 0.1}  # others: 0.02
LOW_RANK = {"update_proj_gap": 10, "scale": 1.0}
OPTIONS: dict[str, dict[str, Any]] = {"galore": LOW_RANK, "galore8bit": {**LOW_RANK, "min_8bit_size": 0}, "adarankgrad": LOW_RANK}


def parameters(dtype: torch.dtype = torch.float32) -> list[tuple[str, nn.Parameter]]:
    """Two matrices of one shape, a wide and a tall one, a convolution, an expert stack, small ones, a vector, a scalar."""
    shapes = {
        "a": (64, 80),
        "b": (64, 80),
        "tall": (160, 48),
        "conv": (48, 12, 3, 3),
        "experts": (3, 40, 40),
        "small": (10, 12),
        "bias": (30,),
        "scale": (),
    }
    return [(name, nn.Parameter((gaussian((*shape, 1), (7, i))[..., 0] * 0.1).to(dtype))) for i, (name, shape) in enumerate(shapes.items())]


def targets(named: list[tuple[str, nn.Parameter]]) -> list[Tensor]:
    return [gaussian((*param.shape, 1), (8, i))[..., 0] for i, (_, param) in enumerate(named)]


def loss_of(named: list[tuple[str, nn.Parameter]], sign: float = 1.0) -> Tensor:
    pairs = zip(named, targets(named), strict=True)
    return sign * 0.5 * torch.stack([(param.float() - target).square().sum() for (_, param), target in pairs]).sum()


def make(name: str, named: list[tuple[str, nn.Parameter]], **options: Any) -> torch.optim.Optimizer:
    return build(name, named, **{"lr": RATES.get(name, 0.02), "rest_lr": RATES.get(name, 0.02), **OPTIONS.get(name, {}), **options})


def train(optimizer: torch.optim.Optimizer, named: list[tuple[str, nn.Parameter]], steps: int, sign: float = 1.0) -> float:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(named, sign)
        loss.backward()
        optimizer.step()
    return float(loss_of(named).detach())


@pytest.mark.parametrize("name", CUDA)
def test_what_needs_cuda_says_so(name: str) -> None:
    with pytest.raises(ConfigError, match=f"optimizer = '{name}' is not legal: .* CUDA"):
        build(name, parameters())


def test_adarankgrad_lowers_its_rank_with_the_gradient_and_keeps_the_information() -> None:
    param = nn.Parameter(torch.zeros(64, 80))
    optimizer = build("adarankgrad", [("w", param)], rank=16, information=0.99, update_proj_gap=1)
    ranks = []
    for rank in (30, 10, 3):
        left, right = torch.linalg.qr(gaussian((64, rank), (1,)))[0], torch.linalg.qr(gaussian((80, rank), (2,)))[0]
        param.grad = left @ right.mT
        optimizer.step()
        basis = next(iter(optimizer.members[0].state.values()))["basis"]  # type: ignore[attr-defined]
        ranks.append(basis.shape[1])
        if rank <= 16:
            assert float((basis.mT @ param.grad).norm() ** 2) >= 0.99 * rank
    assert ranks == [16, 10, 3]


def test_galore8bit_is_galore_with_moments_in_eight_bits() -> None:
    """In 32 bits, which small tensors keep, both packages' steps agree; in 8 bits they stay as near as the codes are fine."""
    ends, bytes_kept = {}, {}
    for name, options in {"galore": {}, "galore8bit": {"min_8bit_size": 10**9}, "eight": {"min_8bit_size": 0}}.items():
        named = parameters()
        optimizer = build(
            "galore" if name == "galore" else "galore8bit", named, lr=0.1, weight_decay=0.01, eps=1e-8, update_proj_gap=4, **options
        )
        train(optimizer, named, 10)
        ends[name], bytes_kept[name] = [param.detach() for _, param in split(named)[0]], state_nbytes(optimizer)
    starts = [param.detach() for _, param in split(parameters())[0]]
    for start, reference, same, eight in zip(starts, ends["galore"], ends["galore8bit"], ends["eight"], strict=True):
        moved = float((reference - start).norm())
        assert float((same - reference).norm()) < 1e-4 * moved
        assert 0.0 < float((eight - reference).norm()) < 0.1 * moved
    assert bytes_kept["galore"] == bytes_kept["galore8bit"]
    moments = optimizer.members[0].state.values()  # type: ignore[attr-defined]
    assert all(state["state1"].dtype == torch.uint8 for state in moments)
    assert bytes_kept["eight"] < 0.6 * bytes_kept["galore"]


@pytest.mark.parametrize("name", NAMES)
def test_decreases_a_convex_quadratic(name: str) -> None:
    named = parameters()
    before = float(loss_of(named).detach())
    starts = [param.detach().clone() for _, param in named]
    assert train(make(name, named), named, 40) < 0.8 * before
    for (label, param), start, target in zip(named, starts, targets(named), strict=True):
        assert float((param.detach() - target).norm()) < float((start - target).norm()), label


@pytest.mark.parametrize("name", NAMES)
def test_deterministic_for_a_seed(name: str) -> None:
    runs = []
    for junk in (0, 1):
        torch.manual_seed(junk)  # the global generator plays no part
        named = parameters()
        train(make(name, named), named, 5)
        runs.append([param.detach() for _, param in named])
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_resume_is_bit_exact_from_plain_tensors(name: str, dtype: torch.dtype) -> None:
    named = parameters(dtype)
    optimizer = make(name, named)
    train(optimizer, named, 3)
    file = io.BytesIO()
    torch.save({"params": [param.detach() for _, param in named], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = [(label, nn.Parameter(value)) for (label, _), value in zip(named, saved["params"], strict=True)]
    restored = make(name, other, lr=123.0)  # the rate comes from the state
    restored.load_state_dict(saved["optimizer"])
    train(optimizer, named, 3)
    train(restored, other, 3)
    for (label, one), (_, two) in zip(named, other, strict=True):
        assert torch.equal(one, two), label
    assert state_nbytes(restored) == state_nbytes(optimizer)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_within_autocast_is_the_step_without(name: str) -> None:
    """Autocast is for the model: torch's AdamW multiplies nothing that it would round, and low-rank methods do."""
    runs = []
    for enabled in (False, True):
        named = parameters()
        optimizer = make(name, named)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(named).backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                optimizer.step()
        runs.append([param.detach() for _, param in named])
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_parameters_without_gradient_stay_and_may_return(name: str) -> None:
    named = parameters()
    optimizer = make(name, named)
    still = {"b", "conv", "bias"}
    for round_ in range(4):
        optimizer.zero_grad()
        loss_of(named).backward()
        before = {label: param.detach().clone() for label, param in named}
        for label, param in named:
            if label in still and round_ % 2:
                param.grad = None
        optimizer.step()
        for label, param in named:
            assert torch.equal(before[label], param) == (label in still and bool(round_ % 2)), label


@pytest.mark.parametrize("name", NAMES)
def test_zero_gradients_are_harmless(name: str) -> None:
    named = parameters()
    optimizer = make(name, named)
    for _ in range(3):
        for _, param in named:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert all(bool(param.isfinite().all()) for _, param in named)
    assert train(optimizer, named, 15) < float(loss_of(parameters()).detach())


@pytest.mark.parametrize("name", NAMES)
def test_scheduler_and_group_options_reach_the_method(name: str) -> None:
    named = parameters()
    optimizer = make(name, named)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step >= 1 else 1.0)
    before = [param.detach().clone() for _, param in named]
    train(optimizer, named, 1)
    assert not any(torch.equal(one, two) for one, (_, two) in zip(before, named, strict=True))
    scheduler.step()
    before = [param.detach().clone() for _, param in named]
    train(optimizer, named, 1)
    assert all(torch.equal(one, two) for one, (_, two) in zip(before, named, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_rest_has_its_own_rate(name: str) -> None:
    named = parameters()
    optimizer = make(name, named, rest_lr=0.0)
    before = {label: param.detach().clone() for label, param in named}
    train(optimizer, named, 1)
    for label, param in named:
        assert torch.equal(before[label], param) == (label in {"small", "bias", "scale"}), label


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_is_decoupled_where_the_gradient_is_zero(name: str) -> None:
    # torch's SGD adds the decay to the gradient: on a zero gradient its first step is the same
    named = parameters()
    optimizer = make(name, named, weight_decay=0.1)
    before = [param.detach().clone() for _, param in named]
    for _, param in named:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    if name == "adafactor":  # its rate is relative, so its decay is too
        assert all(float(param.detach().norm()) < float(start.norm()) for (_, param), start in zip(named, before, strict=True))
        return
    for (label, param), start in zip(named, before, strict=True):
        assert torch.allclose(param, start * (1 - RATES.get(name, 0.02) * 0.1), rtol=1e-5), label


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "mango"])
def test_maximize(name: str) -> None:
    up, down = parameters(), parameters()
    train(make(name, up, maximize=True), up, 10, sign=-1.0)
    train(make(name, down), down, 10)
    for (label, one), (_, two) in zip(up, down, strict=True):
        assert torch.allclose(one, two, atol=1e-6), label


@pytest.mark.parametrize("name", NAMES)
def test_closure_is_called_with_gradients_enabled(name: str) -> None:
    named = parameters()
    optimizer = make(name, named)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(named)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert first is not None and float(optimizer.step(closure).detach()) < float(first.detach())


@pytest.mark.parametrize("name", NAMES)
def test_channels_last_convolutions_step_like_contiguous_ones(name: str) -> None:
    plain = [("conv", nn.Parameter(gaussian((64, 16, 3, 3), (1,))))]
    last = [("conv", nn.Parameter(plain[0][1].detach().clone(memory_format=torch.channels_last)))]
    for named in (plain, last):
        train(make(name, named), named, 3)
    assert torch.allclose(plain[0][1], last[0][1], atol=1e-5)
    assert last[0][1].is_contiguous(memory_format=torch.channels_last)


def test_bytes_by_hand() -> None:
    named = parameters()
    values = sum(param.numel() for _, param in named)
    expected = {"sgd": 4 * values, "adamw": 8 * values + 4 * len(named)}  # torch's fused AdamW keeps a float32 step for each tensor
    for name, nbytes in expected.items():
        optimizer = make(name, named)
        assert state_nbytes(optimizer) == 0
        train(optimizer, named, 1)
        assert state_nbytes(optimizer) == nbytes, name


def test_bytes_of_mango_by_hand() -> None:
    named = [("w", nn.Parameter(gaussian((128, 256), (0,)))), ("small", nn.Parameter(torch.zeros(50)))]
    plan = {"rank": 16, "basis_codec": "bf16", "moment_codec": "int8", "error": "codec", "error_codec": "nf4"}
    optimizer = make("mango", named, plan=plan)
    train(optimizer, named, 1)
    basis, moment, error = 128 * 16 * 2, 16 * 256 + 16 * 256 // 256 * 4, 128 * 256 // 2 + 128 * 256 // 64 * 4
    mean_squares = 4 * (128 + 256)
    assert isinstance(optimizer, Mango)
    assert optimizer.nbytes() == state_nbytes(optimizer) == basis + 2 * moment + error + mean_squares + 2 * 50 * 4


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_positive_and_cover_the_saved_state(name: str) -> None:
    named = parameters()
    optimizer = make(name, named)
    train(optimizer, named, 2)
    seen: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, Tensor) and value.numel():
            seen[value.data_ptr()] = value.nbytes
        elif isinstance(value, dict):
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    walk(optimizer.state_dict())
    assert state_nbytes(optimizer) == sum(seen.values()) > 0


def test_eight_bit_adam_shares_its_maps() -> None:
    named = parameters()
    optimizer = make("adamw8bit", named)
    train(optimizer, named, 1)
    large = sum(param.numel() for _, param in named if param.numel() >= 4096)
    small = sum(param.numel() for _, param in named if param.numel() < 4096)
    blocks = sum(-(-param.numel() // 256) for _, param in named if param.numel() >= 4096)
    assert state_nbytes(optimizer) == 2 * large + 8 * small + 2 * blocks * 4 + 2 * 256 * 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.hidden = nn.Linear(64, 64)
        self.conv = nn.Conv2d(8, 64, 3)
        self.head = nn.Linear(64, 5)


def test_split_rule() -> None:
    matrices, rest = split(Net(), exclude=["^embed"])
    assert [name for name, _ in matrices] == ["hidden.weight", "conv.weight"]
    assert {name for name, _ in rest} == {"embed.weight", "hidden.bias", "conv.bias", "head.weight", "head.bias"}
    net = Net()
    net.hidden.weight.requires_grad_(False)
    assert "hidden.weight" not in dict(split(net)[0]) | dict(split(net)[1])
    assert [name for name, _ in split(net.named_parameters())[0]] == ["embed.weight", "conv.weight"]
    with pytest.raises(
        ConfigError, match=r"exclude = 'attention' is not legal: a regular expression that is found in a parameter's name: embed"
    ):
        split(net, exclude=["attention"])
    with pytest.raises(ConfigError, match=r"exclude = '\(' is not legal: a regular expression \("):
        split(net, exclude=["("])


def test_galore_keeps_its_habit() -> None:
    named = [("w", nn.Parameter(gaussian((64, 80), (0,))))]
    optimizer = make("galore", named, update_proj_gap=3, rank=4)
    assert isinstance(optimizer, Chain)
    bases = []
    for _ in range(7):
        train(optimizer, named, 1)
        bases.append(next(iter(optimizer.members[0].state.values()))["projector"].ortho_matrix.clone())
    assert bases[0].shape == (64, 4)
    changed = [not torch.equal(one, two) for one, two in pairwise(bases)]
    assert changed == [False, False, True, False, False, True]


def test_the_parameters_may_move_between_steps() -> None:
    named = parameters()
    optimizer = make("muon", named)
    train(optimizer, named, 2)
    for _, param in named:
        param.data = param.data.clone()  # as model.to() does
    before = float(loss_of(named).detach())
    assert train(optimizer, named, 20) < before


@pytest.mark.parametrize(
    "name, options, message",
    [
        (
            "adam",
            {},
            r"optimizer = 'adam' is not legal: one of adafactor, adamw, adamw8bit, adarankgrad, ",
        ),
        ("adamw", {"lr": -1.0}, r"options of adamw = .* is not legal: Invalid learning rate"),
        ("sgd", {"momentun": 0.9}, r"options of sgd = .* unexpected keyword argument 'momentun'"),
        ("muon", {"ranks": 3}, r"options of muon = .*'ranks'"),
        ("muon", {"rates": {"head": 0.1}}, r"rates = 'head' is not legal: a regular expression found in the name of a parameter"),
        ("galore", {"rank": 100}, r"plan.rank = 100 is not legal: at most 64, the smaller dimension of a folded to 64 x 80"),
        ("mango", {"plan": {"rank": 0}}, r"plan.rank = 0 is not legal: an integer >= 1 or a fraction in \(0, 1\]"),
        ("mango", {"plan": {"ranks": 4}}, r"plan = 'ranks' is not legal: one of the fields rank, scouts"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name, parameters(), **options)


def test_nothing_to_train() -> None:
    with pytest.raises(ConfigError, match="model = 'no trainable parameter' is not legal"):
        build("adamw", [])
