"""Models: closed forms of the GPT's parts, what its initialisation promises, and that it can learn."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from mango import models, optim
from mango.errors import ConfigError
from mango.models.gpt import GPT, ROTARY_BASE, SOFTCAP, Attention, norm, positions, rotated
from mango.models.head import streamed_loss
from mango.models.sampling import generate


def small(**changes: int) -> GPT:
    torch.manual_seed(0)
    return models.get("gpt", **{"vocabulary": 50, "depth": 2, "width": 32, "heads": 4, "ffn": 3, **changes})


def awake(**changes: int) -> GPT:
    """With a head that is not nearly zero, so that differences show."""
    model = small(**changes)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model


def test_the_parameters_are_the_matrices_and_nothing_else() -> None:
    model = small()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    block = {
        "attention.query": (32, 32),
        "attention.key": (32, 32),
        "attention.value": (32, 32),
        "attention.out": (32, 32),
        "feedforward.up": (96, 32),
        "feedforward.down": (32, 96),
    }
    blocks = {f"blocks.{depth}.{name}.weight": shape for depth in range(2) for name, shape in block.items()}
    assert shapes == {"embedding.weight": (50, 32), **blocks, "head.weight": (50, 32)}
    assert model.state_dict().keys() == shapes.keys()


def test_the_matrices_under_test_leave_out_embedding_and_head() -> None:
    matrices, rest = optim.split(small(width=64, vocabulary=256), ["embedding", "head"])
    assert {name for name, _ in rest} == {"embedding.weight", "head.weight"}
    assert len(matrices) == 2 * 6


def test_no_prediction_depends_on_what_comes_later() -> None:
    model = awake()
    tokens = torch.randint(50, (3, 24), generator=torch.Generator().manual_seed(0))
    before = model(tokens)
    for place in (1, 11, 23):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 50
        after = model(changed)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.allclose(after[:, place:], before[:, place:])
    assert torch.allclose(model(tokens[:, :9]), before[:, :9], atol=1e-6), "a shorter input is a prefix"


def test_attention_is_its_formula() -> None:
    torch.manual_seed(0)
    attention = Attention(8, 2)
    x = torch.randn(1, 5, 8)
    angles = torch.arange(5)[:, None] * ROTARY_BASE ** -torch.tensor([0.0, 0.5])  # 4 channels a head: two angles
    query, key, value = (layer(x)[0].view(5, 2, 4) for layer in (attention.query, attention.key, attention.value))
    expected = torch.zeros(5, 2, 4)
    for head in range(2):
        for t in range(5):
            turned = []
            for vectors in (query, key):
                pairs = torch.view_as_complex(torch.stack((vectors[:, head, :2], vectors[:, head, 2:]), -1)) * torch.exp(1j * angles)
                flat = torch.view_as_real(pairs).permute(0, 2, 1).reshape(5, 4)
                turned.append(flat / flat.square().mean(-1, keepdim=True).add(torch.finfo().eps).sqrt())
            weights = (turned[0][t] @ turned[1][: t + 1].T / 2).softmax(-1)
            expected[t, head] = weights @ value[: t + 1, head]
    found = attention(x, angles.cos(), angles.sin())[0]
    assert torch.allclose(found, attention.out(expected.flatten(1)), atol=1e-6)


def test_grouped_queries_share_keys_and_values() -> None:
    """Two queries to a key: as if each key and value head were there twice."""
    torch.manual_seed(0)
    grouped, plain = Attention(32, 4, 2), Attention(32, 4)
    plain.load_state_dict(grouped.state_dict() | {f"{name}.weight": twice(getattr(grouped, name).weight) for name in ("key", "value")})
    x, (cosine, sine) = torch.randn(2, 9, 32), positions(9, 8, torch.zeros(1))
    assert torch.allclose(grouped(x, cosine, sine), plain(x, cosine, sine), atol=1e-6)


def twice(weight: torch.Tensor) -> torch.Tensor:  # (2 * 8, n) -> (4 * 8, n), each head of 8 rows followed by its copy
    return weight.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)


@pytest.mark.parametrize("depth", [1, 3, 7, 12])
def test_depth_is_the_one_dial(depth: int) -> None:
    with torch.device("meta"):
        model = GPT(100, depth=depth)
    assert model.embedding.weight.shape == (100, 64 * depth) and len(model.blocks) == depth
    assert model.channels >= min(128, 64 * depth) and 64 * depth % (2 * model.channels) in (0, model.channels)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_pass_with_kept_keys_is_the_pass_without(kv_heads: int) -> None:
    """Whatever the pieces in which the tokens come."""
    model = awake(kv_heads=kv_heads)
    tokens = torch.randint(50, (3, 24), generator=torch.Generator().manual_seed(0))
    whole = model(tokens)
    for pieces in ([24], [1] * 24, [7, 1, 9, 1, 6]):
        past = model.past(24)
        found = torch.cat([model(part, past) for part in tokens.split(pieces, dim=1)], dim=1)
        assert torch.allclose(found, whole, atol=1e-5)
    with pytest.raises(ConfigError, match="capacity = 24 is not legal: at least the 25 tokens"):
        model(tokens[:, :1], past)


def test_sampling_is_what_passes_without_kept_keys_would_draw() -> None:
    model = awake()
    prompt = torch.randint(50, (2, 5), generator=torch.Generator().manual_seed(0))
    tokens, generator = prompt, torch.Generator().manual_seed(3)
    for _ in range(12):
        logits = model(tokens)[:, -1]
        weak = logits < logits.sort(descending=True).values[:, 7:8]  # all but the eight likeliest
        tokens = torch.cat((tokens, torch.multinomial((logits.masked_fill(weak, -math.inf) / 0.8).softmax(-1), 1, generator=generator)), 1)
    assert torch.equal(generate(model, prompt, 12, temperature=0.8, top_k=8, seed=3), tokens)
    assert not torch.equal(generate(model, prompt, 12, temperature=0.8, top_k=8, seed=4), tokens)
    likeliest = generate(model, prompt, 4, temperature=0.0)
    assert torch.equal(generate(model, prompt, 4, top_k=1, seed=9), likeliest)
    assert torch.equal(likeliest[:, 5], model(prompt)[:, -1].argmax(-1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": torch.zeros(1, 0, dtype=torch.long)}, r"prompt = \(1, 0\) is not legal"),
        ({"temperature": -1.0}, r"temperature = -1\.0 is not legal: a number >= 0"),
        ({"top_k": 0}, r"top_k = 0 is not legal: an integer >= 1, or None"),
    ],
)
def test_bad_requests_for_samples_are_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        generate(small(), **{"prompt": torch.zeros(1, 1, dtype=torch.long), "count": 1, **options})  # type: ignore[arg-type]


@given(shift=st.integers(0, 15), seed=st.integers(0, 1000))
def test_rotary_products_depend_on_the_distance_alone(shift: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    angles = torch.outer(torch.arange(32.0, dtype=torch.float64), torch.rand(4, generator=generator, dtype=torch.float64))

    def turned(x: torch.Tensor, place: int) -> torch.Tensor:
        return rotated(x[None], angles[place : place + 1].cos(), angles[place : place + 1].sin())[0]

    assert turned(query, 3 + shift) @ turned(key, 1 + shift) == pytest.approx(float(turned(query, 3) @ turned(key, 1)), abs=1e-9)
    assert turned(query, shift).norm() == pytest.approx(float(query.norm()))


def test_it_starts_at_the_uniform_loss_with_unit_activations() -> None:
    model = small(width=64, depth=4)
    tokens = torch.randint(50, (8, 24), generator=torch.Generator().manual_seed(0))
    assert functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).item() == pytest.approx(math.log(50), abs=0.01)
    stream = norm(model.embedding(tokens))
    for block in model.blocks:
        stream = block(stream, *positions(24, model.channels, stream))
    assert 1.0 < stream.square().mean() < 3.0, "the blocks add about as much as the embedding, whatever the depth"


def test_frozen_blocks_still_compute() -> None:
    """The frozen control is a network with random blocks and not one without any."""
    for block in small().blocks:
        assert all(parameter.abs().sum() > 0 for parameter in block.parameters())


def test_logits_stay_within_the_soft_cap() -> None:
    model = small()
    torch.nn.init.normal_(model.head.weight, std=1e3)
    logits = model(torch.arange(24)[None])
    assert logits.abs().max() <= SOFTCAP and logits.isfinite().all()


def test_it_learns_a_rule_that_needs_attention() -> None:
    """The next token is the one three places back: no token tells it by itself."""
    model = small(vocabulary=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        tokens = torch.randint(16, (16, 3), generator=generator).repeat(1, 5)
        loss = functional.cross_entropy(model(tokens)[:, 2:-1].flatten(0, 1), tokens[:, 3:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2 < math.log(16)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 30}, r"model\.width = 30 is not legal: a multiple of 8"),
        ({"depth": 0}, r"model\.depth = 0 is not legal"),
        ({"heads": 0}, r"model\.heads = 0 is not legal"),
        ({"kv_heads": 3}, r"model\.kv_heads = 3 is not legal: a divisor of model\.heads = 4"),
        ({"kv_heads": 0}, r"model\.kv_heads = 0 is not legal"),
        ({"vocabulary": 0}, r"model\.vocabulary = 0 is not legal"),
    ],
)
def test_bad_sizes_are_named(changes: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        small(**changes)


def test_the_streamed_loss_is_the_loss_of_the_logits() -> None:
    torch.manual_seed(0)
    model = models.get("gpt", vocabulary=50, depth=1, width=32, heads=2)
    torch.nn.init.normal_(model.head.weight, std=1.0)  # far enough for the cap to bend
    tokens = torch.randint(50, (2, 12))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    whole = functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    whole.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    for chunk in (5, 1024):
        model.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(streamed_loss, "__defaults__", (chunk,))
            loss = model(inputs, targets=targets)
        assert torch.allclose(loss, whole, atol=1e-6)
        loss.backward()
        for p, grad in zip(model.parameters(), expected, strict=True):
            assert float((p.grad - grad).norm()) <= 1e-5 * float(grad.norm())
