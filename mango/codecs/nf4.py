"""NF4: sixteen levels at quantiles of the normal distribution (QLoRA, arXiv:2305.14314)."""

from __future__ import annotations

from mango.codecs.fourbit import FourBit


class NF4(FourBit):
    """Half a byte a value plus a float32 scale per block (0.5625 bytes a value at block 64).

    Nearest rounding is biased. ``stochastic=True`` rounds at random between the two levels around a value: unbiased, with
    omega = (sqrt(1 + (B-1) l^2) - 1) / 2, l = 0.09105 (T6). ``double_quant=True`` keeps 8-bit scales (0.516 bytes a value) and has
    no certificate.
    """

    name = "nf4"
    levels = (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    )
