"""LRQ: low rank, then a codec on the factor, with the basis orthonormal as it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mango import codecs
from mango.compressors.base import Compressor, check_count, folded
from mango.compressors.lowrank import (
    Directions,
    check_scouts,
    leading_directions,
    projected_alpha,
    rank_and_scouts,
    scaled_matrix,
    unfold,
)
from mango.draws import gaussian
from mango.errors import ConfigError
from mango.orthonormal import orthonormalize
from mango.packed import Packed
from mango.subspace import scout_alpha


class LRQ(Compressor):
    """C(G) = Q q(QᵀG) for the folded G, with q a codec and Q an orthonormal basis of r columns, D = min(m, n).

    Q = orth([decode(encode(V)), S]): V holds r - j tracked columns, stored by ``basis_codec``; S holds j = ``scouts`` Gaussian
    columns, stored as the seed that draws them. Sender and receiver both build Q from the payload, so that it is orthonormal *as used*:
    a stored basis that is merely decoded can make the operator expand (T4).

    alpha = alpha_r alpha_q (T4). S is random given V and G whatever the codec did to V, so alpha_r = j / (D - r + j) in expectation
    (T3), which is why the scouts come after the power step here. Truncated SVD keeps r / D only if the basis is stored exactly.

    Args:
        rank: r, an integer up to D, or a fraction of D (rounded down, at least 1).
        codec: of the factor, a codec or its name.
        scouts: j, from 0 to r.
        basis_codec: of V, a codec or its name.
        method: ``power`` (V is one power step from that of the last call on this shape, a state of this object) or ``svd``.
        seed: of the draws when no generator is passed.

    Raises:
        ConfigError: for a rank, codec, method or number of scouts that is not legal; a rank above D as soon as the shape is known.
    """

    name = "lrq"

    def __init__(
        self,
        rank: int | float = 1 / 8,
        codec: str | codecs.Codec = "nf4",
        scouts: int = 1,
        basis_codec: str | codecs.Codec = "bf16",
        method: str = "power",
        seed: int = 0,
    ) -> None:
        check_count("rank", rank)
        check_scouts(scouts, rank)
        if method not in ("power", "svd"):
            raise ConfigError.of("method", method, "power or svd")
        self.rank, self.scouts, self.method = rank, scouts, method
        self.codec: codecs.Codec = codec if isinstance(codec, codecs.Codec) else codecs.get(codec)
        self.basis_codec: codecs.Codec = basis_codec if isinstance(basis_codec, codecs.Codec) else codecs.get(basis_codec)
        self.directions = Directions(seed)

    def compress(self, x: Tensor, *, generator: torch.Generator | None = None, name: str = "tensor") -> Packed:
        scaled, peak = scaled_matrix(x, generator, name)  # (D, N)
        rank, scouts = rank_and_scouts(self.rank, self.scouts, x.shape)
        tracked = rank - scouts
        if self.method == "svd":
            basis = leading_directions(scaled, tracked)  # (D, r - j)
        elif tracked:
            # one of the tracked columns looks for directions that the warm start does not know
            basis = self.directions.step(scaled, tracked, min(1, scouts), generator)
        else:
            basis = scaled.new_zeros(scaled.shape[0], 0)
        stored = self.basis_codec.encode(basis, generator=generator, name=f"basis of {name}")
        parts: dict[str, Tensor | Packed] = {"basis": stored, "seed": self._seed(x.device, generator)}
        used = self._used(parts, scouts)
        parts["factor"] = self.codec.encode((used.mT @ scaled) * peak, generator=generator, name=f"factor of {name}")
        return Packed(self.name, x.shape, x.dtype, parts, {"scouts": scouts})

    def decompress(self, packed: Packed) -> Tensor:
        self.check_kind(packed)
        factor = packed.parts["factor"]
        assert isinstance(factor, Packed)
        return unfold(self._used(packed.parts, int(packed.numbers["scouts"])) @ self.codec.decode(factor), packed)

    def alpha(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> float:
        rank, scouts = rank_and_scouts(self.rank, self.scouts, shape)
        dim = min(folded(shape))
        if dim == 0:
            return 1.0
        exact_svd = self.method == "svd" and self.basis_codec.alpha() == 1.0
        return projected_alpha(rank / dim if exact_svd else scout_alpha(dim, rank, scouts), self.codec.alpha(), dtype)

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        rank, scouts = rank_and_scouts(self.rank, self.scouts, shape)
        small, large = sorted(folded(shape))
        return self.basis_codec.nbytes((small, rank - scouts)) + self.codec.nbytes((rank, large)) + 8

    def _seed(self, device: torch.device, generator: torch.Generator | None) -> Tensor:
        """Eight bytes that stand for the scouts, (1,)."""
        if generator is None:
            self.directions.draws += 1
            return torch.tensor([self.directions.seed * 0x1_0000_0000 + self.directions.draws], device="cpu")
        return torch.empty(1, dtype=torch.int64, device=device).random_(generator=generator)

    def _used(self, parts: Mapping[str, Tensor | Packed], scouts: int) -> Tensor:
        """Q (D, r) from what is stored. The scouts are drawn on the CPU: their values must not depend on the device."""
        stored, seed = parts["basis"], parts["seed"]
        assert isinstance(stored, Packed) and isinstance(seed, Tensor)
        basis = self.basis_codec.decode(stored)
        if scouts:
            fresh = gaussian((basis.shape[0], scouts), (int(seed),)).to(basis.device)
            basis = torch.cat([basis, fresh - basis @ (basis.mT @ fresh)], dim=1)
        return orthonormalize(basis)
