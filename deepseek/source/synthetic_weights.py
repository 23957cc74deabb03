"""Makes random weights with the spread and the outliers that quantization algorithms treat.

Making them costs about as much as copying. One pool is drawn per model: strips of 128 rows of
Gaussian weights with a log-normal spread over rows and over columns and a few outlier columns,
rounded to FP8 tiles. A linear is assembled 128 rows at a time: one strip, its rows shuffled, its
columns taken from an offset that the whole linear shares (so that outlier columns run through all
rows), its signs flipped by column; for a BF16 model it is then dequantized. Rows of BF16 tables
(embeddings, head, router) start at distinct places of one tape of Gaussian numbers. Norm weights
spread around 1 with a few outlier channels, which cause the outliers of the activations.

The weights lack the correlations of a trained model, so errors measured on them predict nothing.

Each tensor has its own generator, seeded by its name. The same seed, shapes and numpy give the same
bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepseek.config import ModelConfig
from deepseek.formats import FP8_BLOCK, dequantize_fp8_block, quantize_fp8_block
from deepseek.inventory import TensorSpec, tensors

_NUM_STRIPS = 32
#: Largest column offset of a linear in the pool, in FP8 tiles.
_SPARE_TILES = 8
#: Standard deviations of the logarithm.
_ROW_SPREAD, _COLUMN_SPREAD, _NORM_SPREAD = 0.25, 0.15, 0.25
#: One column of `_OUTLIER_EVERY` is larger by the factor `_OUTLIER_SIZE`; likewise in norms.
_OUTLIER_EVERY, _OUTLIER_SIZE = 256, 8.0
#: Largest number of starting places on the tape. An odd stride reaches each once before it repeats.
_MAX_PLACES, _STRIDE = 1 << 22, 2654435761
_TABLE_ROWS = 2048


@dataclass(frozen=True, slots=True)
class _Choice:
    """How a linear is assembled.

    `strips` int64 [rows of tiles], `shift` in columns of tiles, `scale` f32 [rows of tiles, columns
    of tiles]. `random` draws the orders of rows and the signs.
    """

    strips: NDArray[np.int64]
    shift: int
    scale: Tensor
    random: np.random.Generator


class WeightMaker:
    """Makes the tensors of one model, each from its name alone.

    It holds the pool: 79 MB of FP8 and 8 MB of BF16 at DeepSeek-V3's shapes.
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._seed = seed
        self._is_fp8 = config.weight_block_size is not None
        self._specs = {spec.name: spec for spec in tensors(config)}
        shapes = [spec.shape for spec in self._specs.values() if spec.kind == "linear"]
        rows, columns = (max(-(-shape[axis] // FP8_BLOCK) for shape in shapes) for axis in (0, 1))
        self._num_strips = min(_NUM_STRIPS, rows)
        self._codes, self._scales = self._draw_strips(columns + _SPARE_TILES)
        # Masks for the sign bit of e4m3 numbers.
        self._flips = self._random("signs").integers(0, 2, 2 * columns * FP8_BLOCK, np.uint8) << 7
        tables = [spec.shape for spec in self._specs.values() if spec.kind == "high"]
        self._places = min(1 << (16 * config.vocab_size).bit_length(), _MAX_PLACES)
        length = self._places + max(shape[-1] for shape in tables)
        tape = self._random("tape").standard_normal(length, np.float32)
        self._tape = torch.from_numpy(tape).bfloat16()

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yield the values of one tensor, some rows at a time."""
        spec = self._specs.get(name)
        if spec is None:
            yield self._choose(self._specs[name.removesuffix("_scale_inv")]).scale
        elif spec.kind == "linear" and self._is_fp8:
            yield from self._linear(spec)
        elif spec.kind == "linear":
            scale = self._choose(spec).scale
            for row, codes in enumerate(self._linear(spec)):
                yield dequantize_fp8_block(codes, scale[row : row + 1]).bfloat16()
        elif spec.kind == "float32":
            values = 0.05 * self._random(name).standard_normal(spec.shape[0], np.float32)
            yield torch.from_numpy(values + 1 if name.endswith(".weight") else values)
        elif len(spec.shape) == 2:
            yield from self._table(spec)
        else:
            random = self._random(name)
            yield torch.from_numpy(_spread(random, spec.shape[0], _NORM_SPREAD)).bfloat16()

    def _linear(self, spec: TensorSpec) -> Iterator[Tensor]:
        """Yield the rows of tiles: e4m3 [128 or fewer, K]."""
        rows, columns = spec.shape
        choice = self._choose(spec)
        window = slice(choice.shift * FP8_BLOCK, choice.shift * FP8_BLOCK + columns)
        for tile_row, strip in enumerate(choice.strips):
            first = int(strip) * FP8_BLOCK
            order = first + choice.random.permutation(FP8_BLOCK)
            start = int(choice.random.integers(0, len(self._flips) - columns + 1))
            codes = self._codes[:, window][order[: rows - tile_row * FP8_BLOCK]]
            codes ^= self._flips[start : start + columns]
            yield torch.from_numpy(codes).view(torch.float8_e4m3fn)

    def _choose(self, spec: TensorSpec) -> _Choice:
        """Draw how a linear is assembled. The mean square of its weights is 1/K, so outputs are as
        large as inputs."""
        random = self._random(spec.name)
        rows, columns = (-(-size // FP8_BLOCK) for size in spec.shape)
        strips = random.permutation(max(rows, self._num_strips))[:rows] % self._num_strips
        shift = int(random.integers(0, self._scales.shape[1] - columns + 1))
        scale = self._scales[strips, shift : shift + columns] * spec.shape[1] ** -0.5
        return _Choice(strips, shift, scale, random)

    def _table(self, spec: TensorSpec) -> Iterator[Tensor]:
        """Yield BF16 [R, K]: standard normal in embeddings, over sqrt(K) in head and router."""
        rows, columns = spec.shape
        scale = 1.0 if spec.role == "embed_tokens" else columns**-0.5
        start = int(self._random(spec.name).integers(0, self._places))
        places = torch.from_numpy((start + np.arange(rows) * _STRIDE) % self._places)
        starts = self._tape.as_strided((self._places, columns), (1, 1))
        for first in range(0, rows, _TABLE_ROWS):
            yield starts[places[first : first + _TABLE_ROWS]] * scale

    def _draw_strips(self, num_tiles: int) -> tuple[NDArray[np.uint8], Tensor]:
        """The pool: e4m3 as uint8 [strips x 128, tiles x 128], scales f32 [strips, tiles]."""
        columns = _spread(self._random("columns"), num_tiles * FP8_BLOCK, _COLUMN_SPREAD)
        columns /= np.sqrt(np.square(columns).mean())
        codes, scales = [], []
        for strip in range(self._num_strips):
            random = self._random(f"strip {strip}")
            weight = random.standard_normal((FP8_BLOCK, len(columns)), np.float32) * columns
            weight *= np.exp(_ROW_SPREAD * random.standard_normal((FP8_BLOCK, 1), np.float32))
            strip_codes, scale = quantize_fp8_block(torch.from_numpy(weight))
            codes.append(strip_codes.view(torch.uint8).numpy())
            scales.append(scale)
        return np.concatenate(codes), torch.cat(scales)

    def _random(self, name: str) -> np.random.Generator:
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def _spread(random: np.random.Generator, size: int, spread: float) -> NDArray[np.float32]:
    """f32 [size]: log-normal around 1, with one outlier per 256 values and at least one."""
    values = np.exp(spread * random.standard_normal(size, np.float32))
    values[random.permutation(size)[: -(-size // _OUTLIER_EVERY)]] *= _OUTLIER_SIZE
    return values
