"""A factor cache of 8 or 4 bits: whole numbers, and one scale for each row of a factor.

    cache = quantized.new_cache(model, batch_size=1, bits=8)      # in place of model.new_cache(batch_size=1)
    logits = model(tokens, cache)

A row is what one outer product of one token brings: h numbers of a_k, d_h numbers of b_k. Nothing here computes
attention. `factor_attention` reads the cache block by block and turns each block into numbers of full width, so that at
no time more than a block of them exists.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tpa_minimal.tpa import T6, Cache, FactorCache


@dataclass(frozen=True)
class Rows:
    """Rounded rows of a factor: x ≈ (codes - 2^(bits-1)) · scale, for each row its own scale.

    codes: (B, T, R, bytes of a row) uint8, at 4 bits two in a byte; scales: (B, T, R, 1) bfloat16. It stands for a
    tensor (B, T, R, width) of `dtype` wherever attention reads one: it is cut and turned like one, and `to` makes it
    one. (Not for `flash_decode`, whose kernel reads memory itself.)
    """

    codes: Tensor
    scales: Tensor
    width: int
    bits: int
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.codes.shape[:-1], self.width))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def to(self, dtype: torch.dtype) -> Tensor:
        """The numbers that the codes stand for, (B, T, R, width)."""
        codes = self.codes
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)[..., : self.width]
        return (codes.to(dtype) - 2 ** (self.bits - 1)) * self.scales.to(dtype)

    # Views, as `factor_attention` (split) and that of `cpu_decode` (the others) take them; nothing becomes numbers yet.
    def split(self, n: int, dim: int) -> list["Rows"]:
        return [replace(self, codes=c, scales=s) for c, s in zip(self.codes.split(n, dim), self.scales.split(n, dim))]

    def transpose(self, i: int, j: int) -> "Rows":
        return replace(self, codes=self.codes.transpose(i, j), scales=self.scales.transpose(i, j))

    def __getitem__(self, index) -> "Rows":
        return replace(self, codes=self.codes[index], scales=self.scales[index])

    # A chunk of more than tpa.DECODE_TOKENS tokens assembles K and V of the whole context for its call, rows or not.
    @property
    def mT(self) -> Tensor:
        return self.to(self.dtype).mT

    def __truediv__(self, number) -> Tensor:
        return self.to(self.dtype) / number


def quantize(x: Tensor, bits: int) -> Rows:
    """Round each row of x (..., width) to the nearest multiple of its own scale, max |x| / (2^(bits-1) - 1)."""
    most = 2 ** (bits - 1) - 1  # 127 or 7
    scales = (x.abs().amax(-1, keepdim=True) / most).bfloat16()
    # Divide by the scale as it is stored: its own rounding, by 2⁻⁹ at most, then costs nothing more and takes no code
    # beyond `most`. A row of zeros has scale 0.
    codes = (x / scales.to(x.dtype).clamp(min=torch.finfo(torch.bfloat16).tiny)).round()
    codes = (codes + most + 1).to(torch.uint8)
    if bits == 4:
        codes = F.pad(codes, (0, x.shape[-1] % 2))
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    return Rows(codes, scales, x.shape[-1], bits, x.dtype)


class QuantizedCache:
    """A FactorCache that keeps each row in `bits` bits a number and 16 bits of scale; same interface.

    shapes: (rank, width) of each thing kept, as for FactorCache; bits: 8 or 4, one for all or one for each.
    `append` and `view` return Rows in place of tensors. dtype: of the numbers that come out.
    Raises ValueError for sizes or bits that cannot work.
    """

    def __init__(self, shapes, batch_size: int, max_len: int, device=None, dtype=None, bits=8):
        self.dtype, self.widths = dtype or torch.get_default_dtype(), [width for _, width in shapes]
        self.bits = [bits] * len(self.widths) if isinstance(bits, int) else list(bits)
        if len(self.bits) != len(self.widths) or not all(b in (4, 8) for b in self.bits) or 0 in self.widths:
            rule = "4 or 8, one for all or one for each shape, and no width may be 0"
            raise ValueError(f"bits={bits!r} for shapes {list(shapes)}: need {rule}")
        sizes = [(R, (width * b + 7) // 8) for (R, width), b in zip(shapes, self.bits)]
        self.codes = FactorCache(sizes, batch_size, max_len, device, torch.uint8)
        self.scales = FactorCache([(R, 1) for R, _ in shapes], batch_size, max_len, device, torch.bfloat16)

    def append(self, *new: Tensor) -> tuple[Rows, ...]:
        """Round and store what T new tokens bring, each (B, T, R, width); return Rows of all that is held.

        Raises ValueError, with nothing changed, if they do not fit.
        """
        if [x.shape[-1] for x in new] != self.widths:
            raise ValueError(f"the cache expects tensors of widths {self.widths}, not {[x.shape[-1] for x in new]}")
        rows = [quantize(x.detach(), b) for x, b in zip(new, self.bits)]
        self.codes.append(*(row.codes for row in rows))
        self.scales.append(*(row.scales for row in rows))
        return self.view(0, self.length)

    def view(self, start: int, end: int) -> tuple[Rows, ...]:
        """Rows of positions start to end - 1: views of the cache's codes and scales."""
        kept = zip(self.codes.view(start, end), self.scales.view(start, end), self.widths, self.bits)
        return tuple(Rows(*row, self.dtype) for row in kept)

    @property
    def length(self) -> int:
        return self.codes.length

    @property
    def nbytes(self) -> int:
        """Bytes of what is cached now, codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on. Raises ValueError unless 0 <= length <= the present length."""
        self.codes.truncate(length)
        self.scales.truncate(length)


def new_cache(model: T6, batch_size: int, max_len: int | None = None, bits=8) -> Cache:
    """An empty cache of rounded rows for `model`, one entry per layer; use it as that of `model.new_cache`."""
    max_len, caches = model.config.max_len if max_len is None else max_len, []
    for block in model.blocks:
        kept = block.attention.new_cache(1, 1).view(0, 1)  # whatever the mechanism caches, here of one position
        device, dtype = kept[0].device, kept[0].dtype
        caches.append(QuantizedCache([x.shape[2:] for x in kept], batch_size, max_len, device, dtype, bits))
    return Cache(caches)
