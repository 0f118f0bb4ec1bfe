"""Every codec against the contract of ``mango.codecs.base``, and the formats against bitsandbytes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mango import codecs
from mango.bench.timing import paired
from mango.codecs.codebook import worst_error
from mango.codecs.int8 import dynamic_map
from mango.errors import ConfigError, NonFinite
from mango.packed import Packed
from tests.contracts.inputs import DTYPES, SHAPES, adversarial, error_ratio, error_ratios

EXTRA = [
    ("nf4", {"stochastic": True}),
    ("fp4", {"stochastic": True}),
    ("nf4", {"double_quant": True}),
    ("int8", {"double_quant": True}),
    ("nf4", {"block": 256}),
    ("int8", {"block": 64}),
    ("int4", {"block": 16}),
]
ALL = [(name, {}) for name in codecs.REGISTRY] + EXTRA


def every(cases: list[tuple[str, dict]] = ALL) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("name", "options"), cases, ids=[name + "".join(f"-{k}{v}" for k, v in o.items()) for name, o in cases])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(a: Packed, b: Packed) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.tensors(), b.tensors(), strict=True))


@every()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_shape_and_dtype(name: str, options: dict, dtype: torch.dtype) -> None:
    codec = codecs.get(name, **options)
    for shape in SHAPES:
        x = torch.randn(shape, generator=generator()).to(dtype)
        packed = codec.encode(x, generator=generator())
        y = codec.decode(packed)
        assert (packed.kind, packed.shape, packed.dtype) == (codec.name, x.shape, dtype)
        assert (y.shape, y.dtype) == (x.shape, dtype)
        assert packed.nbytes == codec.nbytes(shape) == sum(t.numel() * t.itemsize for t in packed.tensors())
        assert torch.isfinite(y).all()


@every()
def test_stride_does_not_matter(name: str, options: dict) -> None:
    codec = codecs.get(name, **options)
    x = torch.randn(24, 10, 7, generator=generator())
    for view in (x.transpose(0, 2), x[::2, 1:, ::3], x.expand(2, 24, 10, 7), x.flip(0)):
        assert same(codec.encode(view, generator=generator()), codec.encode(view.clone(), generator=generator()))
    tensor = x.requires_grad_()
    assert not codec.decode(codec.encode(tensor, generator=generator())).requires_grad


@every()
def test_more_values_than_one_part(name: str, options: dict) -> None:
    """Large tensors are worked off in parts; each block must come out as it does alone."""
    codec = codecs.get(name, **options)
    x = torch.randn(3 * (1 << 17) + 5, generator=generator())
    packed = codec.encode(x, generator=generator())
    y = codec.decode(packed)
    assert packed.nbytes == codec.nbytes(x.shape)
    if codec.stochastic or options.get("double_quant"):
        assert error_ratio(y, x) < 0.5
    else:
        cut = 1 << 17
        assert torch.equal(y, torch.cat([codec.decode(codec.encode(part)) for part in x.split(cut)]))


@every()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_certificate_on_adversarial_inputs(name: str, options: dict, dtype: torch.dtype) -> None:
    codec = codecs.get(name, **options)
    omega = codec.omega(dtype)
    bound = 1.0 - codec.alpha(dtype) if omega is None else omega
    if options.get("double_quant"):
        assert bound == 1.0  # no certificate
        return
    for what, x in adversarial((16, 96), dtype):
        draws = 200 if codec.stochastic else 1
        many = x.expand(draws, *x.shape)  # whole blocks, so that each draw is quantised as it would be alone
        measured = error_ratios(codec.decode(codec.encode(many, generator=generator())), many)
        spread = 5 * float(measured.std(correction=0)) / draws**0.5
        assert float(measured.mean()) <= bound * (1 + 1e-6) + spread + 1e-13, what


@given(
    st.sampled_from(ALL),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 9), max_size=4),
    st.integers(-8, 4),
    st.integers(0, 2**31),
)
def test_round_trip_of_any_tensor(case, dtype, shape, exponent, seed) -> None:  # type: ignore[no-untyped-def]
    name, options = case
    codec = codecs.get(name, **options)
    x = (torch.randn(shape, generator=generator(seed)) * 10.0 ** max(exponent, -2 if dtype == torch.float16 else -8)).to(dtype)
    packed = codec.encode(x, generator=generator(seed))
    assert same(packed, codec.encode(x, generator=generator(seed)))
    y = codec.decode(packed)
    assert y.shape == x.shape and y.dtype == dtype
    assert packed.nbytes == codec.nbytes(shape)
    if not codec.stochastic and not options.get("double_quant") and x.numel():
        assert error_ratio(y, x) <= (1 - codec.alpha(dtype)) * (1 + 1e-6)


@every([case for case in ALL if codecs.get(case[0], **case[1]).unbiased])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unbiased(name: str, options: dict, dtype: torch.dtype) -> None:
    """The mean of 10^5 draws within five standard errors, value by value."""
    codec = codecs.get(name, **options)
    block, draws = codec.block, 100_000
    x = torch.randn(block, generator=generator(1)) * 3 + 0.5
    x[0], x[1], x[2] = 8.0, 0.0, -7.0
    x = x.to(dtype)
    error = codec.decode(codec.encode(x.expand(draws, block), generator=generator(2))).double() - x.double()
    # probabilities are multiples of 2^-16, arithmetic is float32
    allowance = 5 * error.std(0) / draws**0.5 + 2.0**-16 * 15.0 / 2 + 1e-6
    assert (error.mean(0).abs() <= allowance).all()
    assert abs(float(error.mean())) <= 5 * float(error.mean(1).std()) / draws**0.5 + 1e-6
    omega = codec.omega(dtype)
    assert omega is not None and float(error.square().sum(1).mean()) <= omega * float(x.double().square().sum())


@every([case for case in ALL if codecs.get(case[0], **case[1]).stochastic])
def test_generator_decides(name: str, options: dict) -> None:
    codec = codecs.get(name, **options)
    x = torch.randn(3000, generator=generator())
    assert same(codec.encode(x, generator=generator(1)), codec.encode(x, generator=generator(1)))
    assert not same(codec.encode(x, generator=generator(1)), codec.encode(x, generator=generator(2)))
    assert not same(codec.encode(x), codec.encode(x))


@every()
def test_out_reuses_buffers(name: str, options: dict) -> None:
    codec = codecs.get(name, **options)
    first, second = torch.randn(2, 5, 67, generator=generator())
    packed = codec.encode(first, generator=generator())
    expected = codec.encode(second, generator=generator(1))
    where = [t.data_ptr() for t in packed.tensors()]
    again = codec.encode(second, generator=generator(1), out=packed)
    assert [t.data_ptr() for t in again.tensors()] == where
    assert same(again, expected)

    contiguous, strided = torch.empty(5, 67), torch.empty(67, 5).t()
    assert codec.decode(again, out=contiguous) is contiguous
    assert codec.decode(again, out=strided) is strided
    assert torch.equal(contiguous, strided) and torch.equal(contiguous, codec.decode(again))

    for wrong in (torch.randn(5, 68), torch.randn(67), second.double()):
        with pytest.raises(ConfigError, match="out = "):
            codec.encode(wrong, out=again)
    with pytest.raises(ConfigError, match="out = "):
        codec.decode(again, out=torch.empty(4, 67))
    with pytest.raises(ConfigError, match="out = "):
        codec.decode(again, out=torch.empty(5, 67, dtype=torch.float64))
    rounded = torch.empty(5, 67, dtype=torch.bfloat16)
    assert codec.decode(again, out=rounded) is rounded and torch.equal(rounded, codec.decode(again).bfloat16())


@every()
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_is_named_and_nothing_is_overwritten(name: str, options: dict, bad: float) -> None:
    codec = codecs.get(name, **options)
    x = torch.randn(300, generator=generator())
    packed = codec.encode(x, generator=generator())
    before = [t.clone() for t in packed.tensors()]
    x[257] = bad
    for dtype in DTYPES:
        with pytest.raises(NonFinite, match=r"blocks\.3\.weight"):
            codec.encode(x.to(dtype), name="blocks.3.weight")
    with pytest.raises(NonFinite):
        codec.encode(x, out=packed)
    assert all(torch.equal(a, b) for a, b in zip(before, packed.tensors(), strict=True))


@every()
def test_bad_input(name: str, options: dict) -> None:
    codec = codecs.get(name, **options)
    for wrong in (torch.arange(5), torch.zeros(3, dtype=torch.complex64), torch.zeros(2, dtype=torch.bool)):
        with pytest.raises(ConfigError, match="dtype = "):
            codec.encode(wrong)
    with pytest.raises(ConfigError, match=r"generator\.device = 'cpu'"):
        codec.encode(torch.empty(4, device="meta"), generator=generator())
    packed = codec.encode(torch.ones(3))
    with pytest.raises(ConfigError, match=r"packed\.kind"):
        codec.decode(Packed("other", packed.shape, packed.dtype, packed.parts, packed.numbers))
    if codec.block:
        for block in (0, -64, 48, 4, 1 << 17, 64.0, True, "64"):
            with pytest.raises(ConfigError, match="block = "):
                codecs.get(name, block=block)


def test_unknown_codec_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match="codec = 'int3' is not legal: one of bf16, fp32, fp4, int2, int4, int8, nf4"):
        codecs.get("int3")


@every([case for case in ALL if codecs.get(case[0], **case[1]).block])
def test_blocks_near_zero_are_flushed(name: str, options: dict) -> None:
    """Up to 1e-38 a block decodes to zeros; just above, it is a block like any other."""
    codec = codecs.get(name, **options)
    x = torch.randn(5 * codec.block + 3, generator=generator()).clamp(-1, 1)
    if not options.get("double_quant"):  # whose small scales are lost in the mean
        assert not codec.decode(codec.encode(x * 9e-39, generator=generator())).any()
        assert error_ratio(codec.decode(codec.encode(x * 1e-36, generator=generator())), x * 1e-36) < 0.6
    assert not codec.decode(codec.encode(x * 0, generator=generator())).any()
    x[: codec.block] *= 1e-41
    y = codec.decode(codec.encode(x, generator=generator()))
    assert torch.isfinite(y).all()


def test_payload_does_not_follow_its_source() -> None:
    for name in codecs.REGISTRY:
        x = torch.ones(64)
        packed = codecs.get(name).encode(x)
        y = codecs.get(name).decode(packed)
        x.zero_()
        y.zero_()
        assert codecs.get(name).decode(packed).min() > 0.9, name


def test_stored_bytes() -> None:
    n = 1 << 16
    per_value = {name: codecs.get(name).nbytes((n,)) / n for name in codecs.REGISTRY}
    assert per_value == {"fp32": 4, "bf16": 2, "int8": 1 + 4 / 256, "nf4": 0.5625, "fp4": 0.5625, "int4": 0.5625, "int2": 0.3125}
    assert codecs.get("nf4", double_quant=True).nbytes((n,)) / n == pytest.approx(0.5 + 1 / 64 + 4 / 64 / 256, abs=1e-3)


def test_closed_forms() -> None:
    """T1's and T6's constants."""
    for block, alpha, omega in ((64, 0.8845101952, 0.1169), (128, 0.7916334077, 0.2164), (256, 0.6542385526, 0.3823)):
        assert codecs.get("nf4", block=block).alpha() == pytest.approx(alpha, abs=1e-9)
        assert codecs.get("nf4", block=block, stochastic=True).omega() == pytest.approx(omega, abs=5e-5)
    # the levels themselves are float32
    assert 1 - worst_error(dynamic_map().double().tolist(), 256) == pytest.approx(1763311 / 1768495, abs=1e-8)
    assert 1 - codecs.get("int8").alpha() == pytest.approx(0.0029446, abs=1e-6)
    q, u = math.sqrt(1 - codecs.get("nf4").alpha()), 2.0**-8
    assert 1 - codecs.get("nf4").alpha(torch.bfloat16) == pytest.approx((q + u * (1 + q)) ** 2)


def test_the_codebook_bound_is_reached() -> None:
    """The constructed block comes within 0.1 % of the certificate: it is not a loose bound."""
    for name, sign, level in (("nf4", 1, -0.04552501), ("int8", -1, -73 / 640), ("fp4", 1, 0.0859375)):
        codec = codecs.get(name)
        worst = 0.0
        for shift in torch.linspace(-1e-4, 1e-4, 401).tolist():
            x = torch.full((codec.block,), level + shift)
            x[0] = sign
            worst = max(worst, error_ratio(codec.decode(codec.encode(x)), x))
        assert (1 - codec.alpha()) * 0.993 < worst <= (1 - codec.alpha()) * (1 + 1e-6), name


def test_double_quantised_scales_can_expand() -> None:
    """Why they have no certificate: a block far below the mean scale comes back larger than it was."""
    x = torch.cat([torch.randn(640, generator=generator()), torch.randn(64, generator=generator()) * 1e-3])
    y = codecs.get("nf4", double_quant=True).encode(x)
    assert error_ratio(codecs.get("nf4").decode(y)[640:], x[640:]) > 1


def test_double_quantisation_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    x = torch.randn(64 * 999, generator=generator())
    codes, state = functional.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    packed = codecs.get("nf4", double_quant=True).encode(x)
    assert torch.equal(packed.parts["codes"], codes.view(-1))
    assert torch.equal(packed.parts["scales"].parts["codes"], state.absmax)
    assert torch.equal(packed.parts["scales"].parts["scales"], state.state2.absmax)
    assert torch.equal(packed.parts["mean"][0], state.offset)


def parity_inputs() -> dict[str, torch.Tensor]:
    g = generator(3)
    cases = {}
    for n in (1, 5, 63, 64, 65, 255, 256, 257, 4096, 100_003, 1 << 18):
        cases[f"normal {n}"] = torch.randn(n, generator=g)
    for scale in (1e-3, 1e-30, 1e30, 3e-38, 1e-38, 5e-39, 2.9e-39, 1e-40, 1e-42, 1.4e-45):
        cases[f"scale {scale:g}"] = torch.randn(1000, generator=g) * scale
    cases["zero"], cases["zero ragged"] = torch.zeros(1024), torch.zeros(1001)
    cases["zero blocks"] = torch.randn(4096, generator=g) * (torch.arange(4096) // 256 % 2)
    cases["denormal with zeros"] = torch.randn(1000, generator=g) * 1e-40 * (torch.arange(1000) % 3 > 0)
    cases["negative zero"] = -torch.zeros(300)
    cases["one value"] = torch.zeros(1000).index_fill(0, torch.tensor([300]), -2.0)
    cases["every value"] = torch.linspace(-1, 1, 1 << 20)
    cases["transposed"] = torch.randn(300, 512, generator=g).t()
    cases["strided"] = torch.randn(64, 50, 6, generator=g)[::2, 1:, ::3]
    levels = torch.tensor(codecs.get("nf4").levels)
    bounds = (levels[1:] + levels[:-1]) / 2
    near = torch.cat([bounds, bounds.nextafter(torch.tensor(9.0)), bounds.nextafter(torch.tensor(-9.0)), levels, torch.ones(1)])
    rows = torch.zeros(len(near), 64)
    rows[:, 0], rows[:, 1] = 1.0, near
    cases["thresholds"] = rows
    return cases


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["int8", "nf4", "fp4"])
def test_codes_and_scales_equal_bitsandbytes(name: str, dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for block in (64, 256, 4096):
        codec = codecs.get(name, block=block)
        for what, x in parity_inputs().items():
            x = x.to(dtype)
            if not torch.isfinite(x).all():
                continue
            if name == "int8":
                codes, state = functional.quantize_blockwise(x, blocksize=block)
            else:
                codes, state = functional.quantize_4bit(x, blocksize=block, quant_type=name)
            packed = codec.encode(x)
            assert torch.equal(packed.parts["codes"], codes.reshape(-1)), (what, block)
            assert torch.equal(packed.parts["scales"], state.absmax), (what, block)


def test_decoded_values_equal_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    x = torch.randn(333, 64, generator=generator())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        codes, state = functional.quantize_blockwise(x.to(dtype), blocksize=256)
        assert torch.equal(codecs.get("int8").decode(codecs.get("int8").encode(x.to(dtype))), functional.dequantize_blockwise(codes, state))
        codes, state = functional.quantize_4bit(x.to(dtype), quant_type="nf4")
        assert torch.equal(codecs.get("nf4").decode(codecs.get("nf4").encode(x.to(dtype))), functional.dequantize_4bit(codes, state))


def test_the_8_bit_map_has_no_minus_one_and_zero_is_not_exact() -> None:
    assert float(dynamic_map()[0]) == pytest.approx(-0.99297, abs=1e-5)
    codec = codecs.get("int8")
    x = torch.zeros(256)
    x[0] = 1.0
    assert float(codec.decode(codec.encode(x))[1]) == pytest.approx(2.125e-5, rel=1e-3)


def test_bench_rows() -> None:
    pytest.importorskip("bitsandbytes")
    from mango.bench import REGISTRY

    rows = REGISTRY.load("codecs")(values=4096, repeats=1, warmup=0)
    assert [row["codec"] for row in rows] == list(codecs.REGISTRY)
    assert all(row["seconds"] > 0 and row["copy_ratio"] > 0 for row in rows)
    assert {row["codec"] for row in rows if row["bitsandbytes_ratio"] is not None} == {"int8", "nf4", "fp4"}
    with pytest.raises(ConfigError, match="values = 0"):
        REGISTRY.load("codecs")(values=0)


def test_paired_timing_takes_turns() -> None:
    order: list[str] = []
    times = paired({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2, warmup=1)
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert len(times.seconds["a"]) == 2 and times.worst("a") >= times.median("a") > 0
    assert times.ratio("a", "a") == 1.0
    with pytest.raises(ConfigError, match="repeats = 0"):
        paired({}, repeats=0)
