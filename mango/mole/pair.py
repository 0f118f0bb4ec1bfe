"""relu² and its derivative as one code: the sum of two roundings of one number."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from mango.codecs.affine import decode_compiled, round_bf16
from mango.codecs.base import TINY, all_finite, loops, parts
from mango.codecs.bits import add_uniform, draws, pack
from mango.errors import NonFinite
from mango.mole.stores import Form, Saved
from mango.native.threads import run

BITS = 4
LEVELS = 7  # above zero: the sums 0 .. 14 take four bits
KIND = "pair"


def save(r: Tensor, block: int, name: str) -> Saved:
    r"""Keep r = relu(u) so that both :math:`r^2` and :math:`2 r` can be read back without bias. Derived here.

    Let :math:`r_1, r_2` be independent unbiased roundings of r to the two levels around it. Then :math:`E[r_1 r_2] = r^2`, the value of
    relu², and :math:`E[r_1 + r_2] = 2 r`, its derivative. On levels that are multiples of a step h, the sum :math:`r_1 + r_2 = s h` tells
    the product too, :math:`r_1 r_2 = h^2 \lfloor s/2 \rfloor \lceil s/2 \rceil`. So s is all that is kept: four bits a value and a step
    for each block (its largest value over 7, rounded up to bfloat16), where a code of two bits for each of the two has levels more than
    twice as far apart. With f the place of r between its levels, s is twice the lower one plus a draw of 2 with probability
    :math:`f^2`, of 1 with :math:`2 f (1 - f)`.

    Gradients are linear in the value and in the derivative, and no gradient holds both, so that they may depend on each other.

    Args:
        r: (tokens, hidden), not negative.
        block: values that share a step.
        name: of the layer, said in the error.

    Raises: NonFinite, naming the layer.
    """
    flat, compiled = r.detach().reshape(-1), loops(r.device)
    steps = torch.empty(-(-flat.numel() // block), dtype=torch.float32, device=r.device)
    for lo, hi, width, first, last in parts(flat.numel(), block, r.device, compiled is not None):
        if compiled is not None:
            bits = flat[lo:hi].to(torch.float32).view(torch.int32)
            run(compiled.absmax, last - first, width, bits, block, steps[first:last].view(torch.int32))
        else:
            steps[first:last] = flat[lo:hi].view(-1, width).amax(dim=1)
    if not all_finite(steps):
        raise NonFinite(f"the input of {name} holds NaN, infinity or a value beyond float32")
    steps = round_bf16(torch.where(steps > TINY, steps, 0.0) / LEVELS, up=True)
    divisors = torch.where(steps > 0, steps, 1.0)
    codes = torch.empty(-(-flat.numel() * BITS // 8), dtype=torch.uint8, device=r.device)
    for lo, hi, width, first, last in parts(flat.numel(), block, r.device, compiled is not None):
        if compiled is not None:
            numbers = (divisors[first:last], block, float(2 * LEVELS), draws(hi - lo, r.device, None))
            stored = codes[lo * BITS // 8 : -(-hi * BITS // 8)]
            run(compiled.encode_pair, last - first, width, flat[lo:hi].to(torch.float32), *numbers, stored)
            continue
        v = flat[lo:hi].to(torch.float32).view(-1, width) / divisors[first:last].unsqueeze(1)
        lower = v.floor()
        f = v.sub_(lower)
        draw = add_uniform(torch.zeros_like(f), None)
        s = lower.mul_(2.0).add_(draw < f.square()).add_(draw < f.mul(2.0 - f)).clamp_(0, 2 * LEVELS)
        pack(s.view(-1).to(torch.uint8), BITS, codes[lo * BITS // 8 : -(-hi * BITS // 8)])
    return Saved((codes, steps.to(torch.bfloat16)), Form(KIND, r.shape, r.dtype, ("codes", "steps"), block))


def value(saved: Saved) -> Tensor:
    """The value r², (tokens, hidden) in the dtype of r, without bias but for rounding to that dtype."""
    codes, steps = saved.tensors
    return _decode(saved, _tables(codes.device)[0], steps.to(torch.float32).square())


def derivative(saved: Saved) -> Tensor:
    """The derivative 2 r, likewise."""
    codes, steps = saved.tensors
    return _decode(saved, _tables(codes.device)[1], steps.to(torch.float32))


def _decode(saved: Saved, table: Tensor, scales: Tensor) -> Tensor:
    (codes, _), form = saved
    out = torch.empty(form.shape, dtype=form.dtype, device=codes.device)
    compiled = loops(codes.device)
    for lo, hi, width, first, last in parts(form.shape.numel(), form.block, codes.device, compiled is not None):
        if compiled is not None:
            stored, scale = codes[lo * BITS // 8 : -(-hi * BITS // 8)], scales[first:last]
            groups = (torch.zeros_like(scale), scale, form.block)
            decode_compiled(compiled.decode_affine, stored, *groups, BITS, table, out.view(-1)[lo:hi])
            continue
        index = codes[lo * BITS // 8 : -(-hi * BITS // 8)].to(torch.int32)
        found = table.index_select(0, index).view(torch.float32)[: hi - lo].view(-1, width)
        out.view(-1)[lo:hi].view(-1, width).copy_(found.mul_(scales[first:last].unsqueeze(1)))
    return out


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each byte, ⌊s/2⌋⌈s/2⌉ and s of its two codes, side by side in one wide element as in mango.codecs.affine."""
    byte = torch.arange(256, device=device).unsqueeze(1)
    s = (byte >> torch.tensor([4, 0], device=device)) & 15
    products = (s // 2) * ((s + 1) // 2)
    value, derivative = (t.to(torch.float32).contiguous().view(torch.float64).view(-1) for t in (products, s))
    return value, derivative
