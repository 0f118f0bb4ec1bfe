"""Every compressor against the contract of ``mango.compressors.base``: certificates, unbiasedness, payload, bad input."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mango import codecs, compressors
from mango.compressors import LRQ, Codec, LowRank, Natural, RandK, Sign, TopK
from mango.compressors.base import fold
from mango.compressors.lowrank import projected_alpha
from mango.compressors.sparse import index_type, round_stochastically
from mango.errors import ConfigError, NonFinite
from mango.orthonormal import orthonormalize
from mango.packed import Packed
from tests.contracts.inputs import DTYPES, SHAPES, adversarial, error_ratio

EXTRA = [
    ("codec", {"codec": "int8"}),
    ("codec", {"codec": "bf16"}),
    ("codec", {"codec": "int4"}),
    ("codec", {"codec": "int2"}),
    ("codec", {"codec": "nf4", "stochastic": True}),
    ("codec", {"codec": "nf4", "double_quant": True}),
    ("topk", {"k": 1}),
    ("topk", {"k": 1.0}),
    ("randk", {"scaled": False}),
    ("randk", {"k": 0.9}),
    ("lowrank", {"rank": 1.0}),
    ("lowrank", {"rank": 0.5, "method": "haar"}),
    ("lowrank", {"rank": 0.5, "method": "power"}),
    ("lowrank", {"rank": 0.5, "method": "power", "scouts": 2}),
    ("lrq", {"rank": 0.5, "codec": "int8", "scouts": 3}),
    ("lrq", {"rank": 0.5, "scouts": 0}),
    ("lrq", {"rank": 1.0, "basis_codec": "nf4"}),
    ("lrq", {"rank": 0.5, "basis_codec": "fp32", "scouts": 0, "method": "svd"}),
    ("lrq", {"rank": 0.5, "basis_codec": "fp32", "scouts": 2, "method": "svd", "codec": "int4"}),
]
ALL = [(name, {}) for name in compressors.REGISTRY] + EXTRA


def every(cases: list[tuple[str, dict]] = ALL) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("name", "options"), cases, ids=[name + "".join(f"-{k}={v}" for k, v in o.items()) for name, o in cases])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(a: Packed, b: Packed) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.tensors(), b.tensors(), strict=True))


def randomised(compressor: compressors.Compressor) -> bool:
    x = torch.randn(16, 32, generator=generator(5))
    first, second = (copy.deepcopy(compressor)(x, generator=generator(seed)) for seed in (1, 2))
    return not torch.equal(first, second)


@every()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_shape_and_dtype(name: str, options: dict, dtype: torch.dtype) -> None:
    compressor = compressors.get(name, **options)
    for shape in SHAPES:
        x = torch.randn(shape, generator=generator()).to(dtype)
        packed = compressor.compress(x, generator=generator())
        y = compressor.decompress(packed)
        assert (y.shape, y.dtype) == (x.shape, dtype)
        assert (packed.shape, packed.dtype) == (x.shape, dtype)
        assert packed.nbytes == compressor.nbytes(shape, dtype) == sum(t.numel() * t.itemsize for t in packed.tensors())
        assert torch.isfinite(y).all()
        assert 0.0 <= compressor.alpha(shape, dtype) <= 1.0
        omega = compressor.omega(shape, dtype)
        assert (omega is not None) == compressor.unbiased and (omega is None or omega >= 0)


@every()
def test_reproducible_and_independent_of_stride_and_source(name: str, options: dict) -> None:
    x = torch.randn(17, 40, generator=generator()).t()
    a, b = (compressors.get(name, **options) for _ in range(2))
    kept = a.compress(x, generator=generator(1))
    assert same(kept, b.compress(x.clone(memory_format=torch.contiguous_format), generator=generator(1)))
    # decompression needs the payload alone, and the payload is independent of its source
    expected = compressors.get(name, **options).decompress(kept)
    x.zero_()
    a.compress(torch.ones(40, 17))
    a.decompress(kept).zero_()
    assert torch.equal(a.decompress(kept), expected)
    # without a generator, two objects that were built alike draw alike only if they count their own draws
    assert compressors.get(name, **options)(torch.randn(8, 8)).shape == (8, 8)


@every()
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((16, 96), torch.float32), ((96, 16), torch.bfloat16), ((24, 64), torch.float16), ((64, 24), torch.float64)],
    ids=str,
)
def test_certificate_on_adversarial_inputs(name: str, options: dict, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Measured error (its mean, for a randomised compressor) within the declared certificate, from a cold and from a warm start."""
    compressor = compressors.get(name, **options)
    draws = 8 if randomised(compressor) else 1
    omega = compressor.omega(shape, dtype)
    bound = 1.0 - compressor.alpha(shape, dtype) if omega is None else omega
    if dtype != torch.float32:  # from a warm start, for those that have one
        for step in range(3):
            compressor(torch.randn(shape, generator=generator(step)).to(dtype), generator=generator(step))
    for what, x in adversarial(shape, dtype):
        if bound == 1.0 and name == "codec":
            continue  # nothing is certified, and double-quantised scales do expand
        measured = torch.tensor([error_ratio(copy.deepcopy(compressor)(x, generator=generator(draw)), x) for draw in range(draws)])
        spread = 5 * float(measured.std(correction=0)) / draws**0.5
        assert float(measured.mean()) <= bound * (1 + 1e-6) + spread + 1e-12, what


@given(
    st.sampled_from(ALL),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.lists(st.integers(1, 12), max_size=4),
    st.integers(-25, 25),
    st.integers(0, 2**31),
)
def test_magnitude_does_not_matter(case, dtype, shape, exponent, seed) -> None:  # type: ignore[no-untyped-def]
    """Operators commute with powers of two, so a certificate at one magnitude is one at all."""
    name, options = case
    x = torch.randn(shape, generator=generator(seed)).to(dtype)
    scale = 2.0**exponent
    plain = compressors.get(name, **options)(x, generator=generator(seed)).double()
    scaled = compressors.get(name, **options)(x * scale, generator=generator(seed)).double() / scale
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    assert torch.allclose(plain, scaled, rtol=0, atol=tolerance * max(1.0, float(plain.abs().max())))


UNBIASED = [case for case in ALL if compressors.get(case[0], **case[1]).unbiased]


@every(UNBIASED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unbiased(name: str, options: dict, dtype: torch.dtype) -> None:
    compressor = compressors.get(name, **options)
    x = torch.randn(8, 8, generator=generator(3)) * 3 + 0.5
    x[0, :3] = torch.tensor([8.0, 0.0, -7.0])
    x = x.to(dtype)
    draws = 800
    random = generator(11)
    got = torch.stack([compressor(x, generator=random) for _ in range(draws)]).double()
    error = got - x.double()
    omega = compressor.omega(x.shape, dtype)
    assert omega is not None and len(UNBIASED) > 5
    ratios = error.square().sum((1, 2)) / x.double().square().sum()
    assert float(ratios.mean()) <= omega * (1 + 1e-6) + 5 * float(ratios.std()) / draws**0.5 + 1e-12
    # an outcome rarer than 1 in `draws` may be missing from the sample: its weight bounds what that does to the mean
    unseen = (got.amax((0,)) - got.amin((0,)) + x.double().abs()) * 5 / draws
    assert (error.mean(0).abs() <= 5 * error.std(0) / draws**0.5 + 1e-6 + torch.where(error.std(0) == 0, unseen, 0.0)).all()


@every()
def test_bad_input(name: str, options: dict) -> None:
    compressor = compressors.get(name, **options)
    for wrong in (torch.arange(6).view(2, 3), torch.zeros(2, 2, dtype=torch.complex64)):
        with pytest.raises(ConfigError, match="dtype = "):
            compressor.compress(wrong)
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.ones(4, 70)
        x[3, 69] = bad
        with pytest.raises(NonFinite, match=r"layer\.weight"):
            compressor.compress(x, name="layer.weight")
    with pytest.raises(ConfigError, match=r"generator\.device = 'cpu'"):
        compressor.compress(torch.empty(4, 4, device="meta"), generator=generator())
    packed = compressor.compress(torch.ones(4, 8))
    with pytest.raises(ConfigError, match=r"packed\.kind = 'other'"):
        compressor.decompress(Packed("other", packed.shape, packed.dtype, packed.parts, packed.numbers))


@pytest.mark.parametrize("wrong", [0, -1, 0.0, 1.5, -0.5, math.nan, True, "8", None])
def test_illegal_counts(wrong: object) -> None:
    for build, field in ((TopK, "k"), (RandK, "k"), (LowRank, "rank"), (LRQ, "rank")):
        with pytest.raises(ConfigError, match=f"^{field} = "):
            build(wrong)


def test_illegal_options() -> None:
    for build in (lambda: LowRank(4, method="qr"), lambda: LRQ(4, method="haar")):
        with pytest.raises(ConfigError, match="method = "):
            build()
    for build in (
        lambda: LowRank(4, method="power", scouts=5),
        lambda: LowRank(4, method="svd", scouts=1),
        lambda: LRQ(4, scouts=-1),
        lambda: LRQ(4, scouts=5),
        lambda: LRQ(4, scouts=1.0),
    ):
        with pytest.raises(ConfigError, match="scouts = "):
            build()
    with pytest.raises(ConfigError, match="block = 48"):
        Codec("nf4", block=48)
    with pytest.raises(ConfigError, match="codec = 'int5'"):
        LRQ(4, codec="int5")
    with pytest.raises(ConfigError, match="options = "):
        Codec(codecs.get("nf4"), block=64)


def test_counts_above_the_dimension_name_the_shape() -> None:
    for compressor in (LowRank(9), LowRank(9, method="power"), LRQ(9)):
        for call in (lambda c: c.compress(torch.ones(8, 2, 10)), lambda c: c.alpha((8, 2, 10)), lambda c: c.nbytes((8, 2, 10))):
            with pytest.raises(ConfigError, match=r"rank = 9 is not legal: at most 8, the smaller dimension of shape \(8, 2, 10\)"):
                call(compressor)
    for compressor in (TopK(7), RandK(7)):
        with pytest.raises(ConfigError, match=r"k = 7 is not legal: at most 6, the number of entries of shape \(2, 3\)"):
            compressor.compress(torch.ones(2, 3))


def test_fold() -> None:
    assert fold(torch.ones(8, 4, 3, 3)).shape == (8, 36)
    assert fold(torch.ones(5)).shape == fold(torch.ones(1, 5)).shape == (1, 5)
    assert fold(torch.ones(())).shape == (1, 1)


# closed forms


def test_declared_constants() -> None:
    assert TopK(5).alpha((4, 5)) == 0.25
    assert RandK(5).omega((4, 5)) == pytest.approx(3.0) and RandK(5).alpha((4, 5)) == 0.0
    assert RandK(5, scaled=False).alpha((4, 5)) == 0.25 and not RandK(5, scaled=False).unbiased
    assert Sign().alpha((4, 5)) == pytest.approx(1 / 20)
    assert (Natural().omega((3,)), Natural().alpha((3,))) == (1 / 8, 7 / 8)
    assert LowRank(8).alpha((64, 128)) == pytest.approx(8 / 64, rel=3e-5)
    assert LowRank(8, method="haar").alpha((128, 64)) == pytest.approx(8 / 64, rel=3e-5)
    assert LowRank(8, method="power").alpha((64, 128)) == 0.0
    assert LowRank(8, method="power", scouts=2).alpha((64, 128)) == pytest.approx(2 / 58, rel=3e-5)
    nf4 = codecs.get("nf4").alpha()
    assert LRQ(8, codec="nf4", scouts=2).alpha((64, 128)) == pytest.approx(2 / 58 * nf4, rel=1e-4)
    assert LRQ(8, codec="nf4", scouts=0).alpha((64, 128)) == 0.0
    assert LRQ(8, codec="nf4", scouts=0, method="svd", basis_codec="fp32").alpha((64, 128)) == pytest.approx(8 / 64 * nf4, rel=1e-4)
    assert LRQ(8, codec="nf4", scouts=0, method="svd").alpha((64, 128)) == 0.0  # SVD's constant does not survive a rounded basis
    assert LRQ(8, codec="nf4", scouts=2, method="svd").alpha((64, 128)) == pytest.approx(2 / 58 * nf4, rel=1e-4)
    assert Codec("nf4").alpha((3, 3)) == pytest.approx(nf4, abs=1e-6)
    assert compressors.get("identity").alpha((3,)) == 1.0


def test_projected_alpha_bounds_rounding() -> None:
    """alpha_r alpha_q less what rounding takes; nothing at all when the captured share is lost in it."""
    assert projected_alpha(0.1, 0.9, torch.float32) == pytest.approx(0.09, rel=1e-4)
    assert 0.08 < projected_alpha(0.1, 0.9, torch.bfloat16) < projected_alpha(0.1, 0.9, torch.float16) < 0.09
    assert projected_alpha(1e-5, 0.9, torch.bfloat16) == 0.0
    assert projected_alpha(0.5, 0.0, torch.float32) == projected_alpha(0.0, 0.5, torch.float32) == 0.0
    assert projected_alpha(1.0, 1.0, torch.float32) == pytest.approx(1.0, abs=3e-5)


def test_bounds_that_are_reached() -> None:
    """Flat magnitudes and spectra, one-hot tensors, 4/3 of a power of two."""
    flat = torch.ones(16, 16)
    assert error_ratio(TopK(64)(flat), flat) == pytest.approx(1 - TopK(64).alpha(flat.shape))
    eye = torch.eye(16, 48)
    for method in ("svd", "haar", "power"):
        assert error_ratio(LowRank(4, method=method)(eye), eye) == pytest.approx(0.75, abs=1e-5)
    hot = torch.zeros(50).index_fill(0, torch.tensor([7]), 3.0)
    assert error_ratio(Sign()(hot), hot) == pytest.approx(1 - 1 / 50)
    third = torch.full((100_000,), 4 / 3)
    assert error_ratio(Natural()(third, generator=generator()), third) == pytest.approx(1 / 8, rel=0.01)
    x = torch.randn(1000, generator=generator())
    errors = [error_ratio(RandK(250)(x, generator=generator(seed)), x) for seed in range(200)]
    assert sum(errors) / 200 == pytest.approx(3.0, rel=0.05)


def test_haar_captures_rank_over_dimension_on_average() -> None:
    """Exactly k/n whatever the matrix: a rank-one matrix has the largest spread."""
    g = torch.outer(torch.randn(32, generator=generator()), torch.randn(40, generator=generator()))
    ratios = torch.tensor([error_ratio(LowRank(8, method="haar")(g, generator=generator(s)), g) for s in range(400)])
    assert abs(float(ratios.mean()) - 0.75) <= 5 * float(ratios.std()) / 20


def test_warm_power_step_alone_can_miss_everything_and_scouts_do_not() -> None:
    """T2 and T3: a direction outside the warm basis stays invisible without scouts; with them its share is certified."""
    first = torch.zeros(32, 40)
    first[:4, :4] = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    blind, scouting = LowRank(4, method="power"), LowRank(4, method="power", scouts=1)
    for compressor in (blind, scouting):
        for _ in range(30):
            compressor(first)
    later = first.clone()  # the warm directions stay weakly present, all else is new
    later[4:, 4:] = 1e3 * torch.eye(28, 36)
    before = blind.decompress(blind.compress(later))
    assert error_ratio(before, later) > 0.99999
    ratios = [error_ratio(copy.deepcopy(scouting)(later, generator=generator(seed)), later) for seed in range(200)]
    assert sum(ratios) / 200 <= 1 - scouting.alpha(later.shape) + 0.01


def test_lrq_basis_is_orthonormal_as_used() -> None:
    """The residual is orthogonal to what is kept, also when the stored basis is four-bit; merely decoding it would not do."""
    g = torch.randn(64, 300, generator=generator())
    lrq = LRQ(16, codec="fp32", scouts=0, basis_codec="nf4", method="svd")
    packed = lrq.compress(g)
    y = lrq.decompress(packed)
    assert abs(float((y * (g - y)).sum())) <= 1e-4 * float(g.square().sum())
    decoded = codecs.get("nf4").decode(packed.parts["basis"])
    assert float((decoded.mT @ decoded - torch.eye(16)).abs().max()) > 1e-2
    used = orthonormalize(decoded)
    assert torch.allclose(used @ (used.mT @ g), y, atol=1e-4)


def test_lrq_learns_the_dominant_directions() -> None:
    g = torch.randn(48, 6, generator=generator()) @ torch.randn(6, 200, generator=generator(1)) + 1e-2 * torch.randn(
        48, 200, generator=generator(2)
    )
    lrq = LRQ(8, codec="int8", scouts=1)
    errors = [error_ratio(lrq(g), g) for _ in range(4)]
    assert errors[-1] < 0.01
    assert lrq.nbytes((48, 200)) < 0.25 * g.numel() * 4


def test_payloads_are_small() -> None:
    assert [index_type(d).itemsize for d in (1, 256, 257, 65536, 65537, 2**31, 2**31 + 1)] == [1, 1, 2, 2, 4, 4, 8]
    assert TopK(10).nbytes((256,)) == 10 * 5 and TopK(10).nbytes((257,), torch.bfloat16) == 10 * 4
    assert Sign().nbytes((1000,)) == 125 + 4
    assert Natural().nbytes((1000,)) == 1125
    assert LRQ(8, codec="nf4", scouts=1, basis_codec="bf16").nbytes((64, 128)) == 64 * 7 * 2 + 8 * 128 * 9 // 16 + 8


def test_topk_keeps_the_largest() -> None:
    x = torch.tensor([[0.1, -5.0, 2.0], [0.0, 3.0, -0.2]])
    assert torch.equal(TopK(2)(x), torch.tensor([[0.0, -5.0, 0.0], [0.0, 3.0, 0.0]]))


def test_overflow_is_an_error_not_infinity() -> None:
    with pytest.raises(NonFinite, match="d/k = 4"):
        RandK(0.25)(torch.full((400,), 3e4, dtype=torch.float16))
    with pytest.raises(NonFinite, match="power of two"):
        Natural()(torch.full((4,), 6e4, dtype=torch.float16))


def test_stochastic_rounding_to_16_bits() -> None:
    x = torch.tensor([1.0, 1.003, -2.7e-5, 300.7, 0.0]).expand(200_000, 5)
    for dtype in (torch.bfloat16, torch.float16):
        y = round_stochastically(x, dtype, generator()).double()
        assert ((y - x.double()).mean(0).abs() <= 5 * y.std(0) / 200_000**0.5 + 1e-12).all()
        assert len(y[:, 1].unique()) == 2 and len(y[:, 0].unique()) == 1
