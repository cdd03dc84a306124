"""Cost volume: how similar the features of a target are to those of a source at nearby voxels.

Source: the correlation layer of Dosovitskiy et al., "FlowNet: learning optical flow with convolutional networks", ICCV
2015; over 2 voxels at each scale in Chen et al., MASS, Medical Image Analysis 80, 2022, 102506.

    V(k, x) = mean_c T_c(x) S_c(x + k),    k from -r to r along every axis

A tile of the target needs a window of the source, r voxels larger on every side. The similarities of all voxels of the
one with all of the other are a matrix product over channels; the wanted ones lie on its diagonals, where a strided view
reads them. That a product holds three times as many or more is made up for by the speed at which it is made.

On a CPU the forward pass is faster a channel at a time, all shifts at once, into sums that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from nnunetv2_semi.precision import without_autocast

_TILE_2D, _TILE_3D = (1, 4, 8), (2, 4, 4)
_BYTES_PER_THREAD = 2**22  # handled at once, which stay in the cache
_BYTES_ON_GPU = 2**28  # where the number of launches counts


@torch.compiler.disable  # its backward pass is written by hand: there is nothing to gain, and much to trace
def cost_volume(target: torch.Tensor, source: torch.Tensor, radius: int = 2) -> torch.Tensor:
    """Mean over channels of target(x) * source(x + k), (B, (2 radius + 1)^n, *spatial); the source is 0 outside.

    target, source: features (B, C, *spatial) over n = 2 or 3 spatial axes. radius: of shifts k, voxels along each axis;
    they are in row-major order from (-radius, ..., -radius), the last axis fastest. Computed in the dtype of the input
    (of two, the wider one), within autocast too. Gradients reach both, but no gradients of gradients.
    Memory beside the result: in the forward pass a copy of each input, with a margin of ``radius``, and 4 MiB a thread
    (256 MiB on a GPU); in the backward pass as much again for the gradients; in between nothing but the inputs. Where a
    size is no multiple of a tile (2 x 4 x 4 voxels, 4 x 8 in 2D) the backward pass, and on a GPU the forward pass too,
    holds the volume twice.
    Raises ValueError for differing shapes, another number of axes or a negative radius.
    """
    dimensions = target.ndim - 2
    if target.shape != source.shape or dimensions not in (2, 3):
        raise ValueError("target and source must be (B, C, *spatial) of the same shape with 2 or 3 spatial axes, got "
                         f"{tuple(target.shape)} and {tuple(source.shape)}")
    if radius < 0:
        raise ValueError(f"radius must not be negative, got {radius}")
    dtype = torch.promote_types(target.dtype, source.dtype)
    target, source = target.to(dtype), source.to(dtype)
    if dimensions == 3:
        return _CostVolume.apply(target, source, (radius,) * 3)
    return _CostVolume.apply(target.unsqueeze(2), source.unsqueeze(2), (0, radius, radius)).squeeze(2)


class _CostVolume(torch.autograd.Function):
    """Nothing but the inputs is kept. The gradient is written on the diagonals of matrices of zeros; their products
    with windows and with tiles are the gradients of the target and of the source."""

    @staticmethod
    def forward(ctx: Any, target: torch.Tensor, source: torch.Tensor, radii: tuple[int, ...]) -> torch.Tensor:
        """target, source: (B, C, *three axes). Returns (B, shifts, *three axes)."""
        ctx.save_for_backward(target, source)
        ctx.radii = radii
        if target.device.type == "cpu" and target.dtype in (torch.float32, torch.float64):
            return _by_channels(target, source, radii)
        return _by_tiles(target, source, radii)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        target, source = ctx.saved_tensors
        channels, radii = target.shape[1], ctx.radii
        cut = _Tiling.of(target.shape[2:], radii)
        tiles, windows = cut.tiles(cut.channels_last(target)), cut.windows(cut.channels_last(source, radii))
        of_tiles = cut.tiles(cut.padded(upstream).unflatten(1, cut.shifts).movedim((1, 2, 3), (4, 5, 6)))
        to_target = target.new_empty(len(target), *cut.filled, channels)
        to_tiles = cut.tiles(to_target)
        # windows overlap, and half precision would round each sum
        to_source = source.new_zeros(len(source), *cut.with_margin, channels,
                                     dtype=torch.promote_types(source.dtype, torch.float32))
        matrices = target.new_zeros(0)
        for block in cut.blocks(tiles):
            part = of_tiles[block]
            count = part.shape[:4].numel()
            if count > len(matrices):  # the first block is the largest; off the diagonals nothing is ever written
                matrices = target.new_zeros(count, cut.window.numel(), cut.tile.numel())
            cut.diagonals(matrices[:count], part.shape[:4]).copy_(part)
            if ctx.needs_input_grad[0]:
                rows = _mean_product(matrices[:count].mT, _rows(windows[block]), channels)
                to_tiles[block] = rows.view(to_tiles[block].shape)
            if ctx.needs_input_grad[1]:
                rows = _mean_product(matrices[:count], _rows(tiles[block]), channels)
                cut.add_windows(to_source, rows.view(windows[block].shape), block)
        del tiles, windows
        of_target = cut.clipped(to_target.movedim(-1, 1)) if ctx.needs_input_grad[0] else None
        of_source = cut.clipped(to_source.movedim(-1, 1), radii).to(source) if ctx.needs_input_grad[1] else None
        return of_target, of_source, None


def _by_channels(target: torch.Tensor, source: torch.Tensor, radii: tuple[int, ...]) -> torch.Tensor:
    """The cost volume, summed over one channel after another.

    Zeros stand after each row and each plane of the source, and so before the next one. Then a shift is an offset in
    memory, and the rows of a plane are read in one run.
    """
    batch, channels, depth, height, width = target.shape
    deep, high, wide = radii
    row, planes = width + wide, depth + 2 * deep
    plane, lead = (height + high) * row, high * row + wide
    spaced = source.new_zeros(batch, channels, lead + planes * plane + wide)
    inside = spaced[..., lead:lead + planes * plane].unflatten(2, (planes, -1, row))
    inside[:, :, deep:deep + depth, :height, :width] = source
    shifts = [2 * radius + 1 for radius in radii]
    shifted = spaced.as_strided((batch, channels, *shifts, depth, height * row),
                                (*spaced.stride()[:2], plane, row, 1, plane, 1))
    target = F.pad(target, (0, wide)).flatten(3)
    volume = target.new_empty(batch, *shifts, depth, height, width)
    lines = _bytes_at_once(target) // (target.element_size() * prod(shifts) * row)
    planes_at_once, lines = max(1, lines // height), min(max(1, lines), height)
    for patch, z, y in product(range(batch), range(0, depth, planes_at_once), range(0, height, lines)):
        voxels = (..., slice(z, z + planes_at_once), slice(y * row, (y + lines) * row))
        of_source = shifted[patch][voxels]
        total = of_source.new_zeros(of_source.shape[1:])
        for one, other in zip(target[patch][voxels], of_source, strict=True):
            total.addcmul_(one, other, value=1 / channels)
        volume[patch, ..., z:z + planes_at_once, y:y + lines, :] = total.unflatten(-1, (-1, row))[..., :width]
    return volume.flatten(1, 3)


def _by_tiles(target: torch.Tensor, source: torch.Tensor, radii: tuple[int, ...]) -> torch.Tensor:
    """The cost volume, from the diagonals of matrix products."""
    cut = _Tiling.of(target.shape[2:], radii)
    tiles, windows = cut.tiles(cut.channels_last(target)), cut.windows(cut.channels_last(source, radii))
    volume = target.new_empty(len(target), *cut.shifts, *cut.filled)
    of_tiles = cut.tiles(volume.movedim((1, 2, 3), (4, 5, 6)))
    for block in cut.blocks(tiles):
        products = _mean_product(_rows(windows[block]), _rows(tiles[block]).mT, target.shape[1])
        part = of_tiles[block]
        part.copy_(cut.diagonals(products, part.shape[:4]))
    return cut.clipped(volume.flatten(1, 3))


def _bytes_at_once(features: torch.Tensor) -> int:
    return _BYTES_PER_THREAD * torch.get_num_threads() if features.device.type == "cpu" else _BYTES_ON_GPU


def _rows(voxels: torch.Tensor) -> torch.Tensor:
    """(b, z, y, x, *voxels of three axes, C) -> (b z y x, voxels, C)."""
    return voxels.flatten(4, 6).flatten(0, 3)


def _mean_product(first: torch.Tensor, second: torch.Tensor, channels: int) -> torch.Tensor:
    """Matrix products (N, I, K) @ (N, K, J), divided by ``channels`` before they are rounded to half precision."""
    products = first.new_empty(len(first), first.shape[1], second.shape[2])
    with without_autocast(first.device):
        return torch.baddbmm(products, first, second, beta=0, alpha=1 / channels, out=products)


@dataclass(frozen=True)
class _Tiling:
    """How a volume of three axes is cut: voxels of the volume, of a tile, and of the margin around it."""

    sizes: torch.Size
    tile: torch.Size
    margin: tuple[int, ...]

    @classmethod
    def of(cls, sizes: torch.Size, margin: tuple[int, ...]) -> _Tiling:
        tile = _TILE_2D if sizes[0] == 1 else _TILE_3D
        return cls(sizes, torch.Size(min(pair) for pair in zip(tile, sizes, strict=True)), margin)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Tiles along each axis; the last one may reach beyond the volume."""
        return tuple(-(-size // tile) for size, tile in zip(self.sizes, self.tile, strict=True))

    @cached_property
    def filled(self) -> tuple[int, ...]:
        """Voxels along each axis of whole tiles."""
        return tuple(count * tile for count, tile in zip(self.counts, self.tile, strict=True))

    @cached_property
    def with_margin(self) -> tuple[int, ...]:
        return tuple(filled + 2 * margin for filled, margin in zip(self.filled, self.margin, strict=True))

    @cached_property
    def window(self) -> torch.Size:
        return torch.Size(tile + 2 * margin for tile, margin in zip(self.tile, self.margin, strict=True))

    @cached_property
    def shifts(self) -> tuple[int, ...]:
        return tuple(2 * margin + 1 for margin in self.margin)

    def padded(self, volume: torch.Tensor, margin: Sequence[int] = (0, 0, 0)) -> torch.Tensor:
        """(..., *sizes) -> (..., *(filled + 2 margin)), zeros outside."""
        sides = [side for size, filled, around in zip(self.sizes, self.filled, margin, strict=True)
                 for side in (filled - size + around, around)]
        return F.pad(volume, sides[::-1]) if any(sides) else volume

    def clipped(self, volume: torch.Tensor, margin: Sequence[int] = (0, 0, 0)) -> torch.Tensor:
        """The way back: (..., *(filled + 2 margin)) -> (..., *sizes), contiguous."""
        for axis, (size, around) in enumerate(zip(self.sizes, margin, strict=True), -3):
            volume = volume.narrow(axis, around, size)
        return volume.contiguous()

    def channels_last(self, volume: torch.Tensor, margin: Sequence[int] = (0, 0, 0)) -> torch.Tensor:
        """(B, C, *sizes) -> (B, *(filled + 2 margin), C), zeros outside."""
        padded = self.padded(volume, margin)
        return padded.flatten(2).mT.contiguous().unflatten(1, padded.shape[2:])

    def tiles(self, volume: torch.Tensor) -> torch.Tensor:
        """View of (B, *filled, ...) as (B, *counts, *tile, ...)."""
        for axis in (3, 2, 1):
            volume = volume.unflatten(axis, (-1, self.tile[axis - 1]))
        return volume.movedim((3, 5), (2, 3))

    def windows(self, volume: torch.Tensor) -> torch.Tensor:
        """View of (B, *with_margin, C) as (B, *counts, *window, C); windows overlap."""
        for axis in (1, 2, 3):
            volume = volume.unfold(axis, self.window[axis - 1], self.tile[axis - 1])
        return volume.movedim(4, -1)

    @cached_property
    def _diagonal_strides(self) -> tuple[int, ...]:
        """Of a matrix (window, tile): one voxel further in both, per axis; and one further in the window alone."""
        tile, window = self.tile, self.window
        across = (tile[1] * tile[2], tile[2], 1)
        along = (window[1] * window[2] * tile.numel(), window[2] * tile.numel(), tile.numel())
        return *(both + one for both, one in zip(along, across, strict=True)), *along

    def diagonals(self, matrices: torch.Tensor, block: Sequence[int]) -> torch.Tensor:
        """View (*block, *tile, *shifts) of contiguous matrices (tiles, window, tile): voxel t of a tile with t + k of
        its window. block: tiles of (B, *counts) there are."""
        strides = (self.window.numel() * self.tile.numel(), *self._diagonal_strides)
        return matrices.as_strided((len(matrices), *self.tile, *self.shifts), strides).unflatten(0, block)

    def add_windows(self, volume: torch.Tensor, windows: torch.Tensor, block: Sequence[slice]) -> None:
        """Add (*block, *window, C) to where these windows lie in ``volume``, (B, *with_margin, C).

        Pieces no larger than a tile, from the same place in each window, do not overlap.
        """
        pieces = []
        for window, tile, count in zip(self.window, self.tile, windows.shape[1:4], strict=True):
            step = tile if count > 1 else window
            pieces.append([(begin, min(step, window - begin)) for begin in range(0, window, step)])
        for piece in product(*pieces):
            place, part = volume[block[0]], windows
            for axis, (begin, length) in enumerate(piece, 1):
                tile = self.tile[axis - 1]
                voxels = (windows.shape[axis] - 1) * tile + length
                place = place.narrow(axis, block[axis].start * tile + begin, voxels).unfold(axis, length, tile)
                part = part.narrow(3 + axis, begin, length)
            place.movedim(4, -1).add_(part)

    def blocks(self, tiles: torch.Tensor) -> Iterator[tuple[slice, ...]]:
        """Slices of (B, *counts) that divide all of (B, *counts, *tile, C) into what is handled at once."""
        window, tile, channels = self.window.numel(), self.tile.numel(), tiles.shape[-1]
        left = _bytes_at_once(tiles) // (tiles.element_size() * (window * tile + (window + tile) * channels))
        steps = []
        for count in tiles.shape[3::-1]:
            parts = -(-count // max(1, min(count, left)))
            steps.append(-(-count // parts))
            left //= count
        ranges = (range(0, count, step) for count, step in zip(tiles.shape, steps[::-1], strict=False))
        for start in product(*ranges):
            yield tuple(slice(begin, begin + step) for begin, step in zip(start, steps[::-1], strict=True))
