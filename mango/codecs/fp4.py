"""FP4: sign, two exponent bits, one mantissa bit, as bitsandbytes defines it."""

from __future__ import annotations

from mango.codecs.fourbit import FourBit

MAGNITUDES = tuple(value / 12.0 for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))  # by the three lower bits


class FP4(FourBit):
    """Half a byte a value plus a float32 scale per block; codes are in bit-pattern order, with a positive and a negative zero."""

    name = "fp4"
    levels = MAGNITUDES + tuple(-magnitude for magnitude in MAGNITUDES)
