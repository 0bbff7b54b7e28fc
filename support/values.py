"""What the numbers of an image mean: white, their range, and which of them stand for no data.

Letters as in decompose.py.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from support.image_files import DataError, blocks
from support.loss import IGNORE


def white(image: Tensor) -> int:
    """The value of white: 255 or 65535 in pictures of 8 or 16 bits, 1 in any other type."""
    if image.dtype in (torch.uint8, torch.uint16):
        return torch.iinfo(image.dtype).max
    return 1


def normalise(tile: Tensor, mean: Sequence[float], std: Sequence[float],
              value_range: Sequence[Sequence[float]] | None = None) -> Tensor:
    """A tile (B,C,h,w) as it is stored -> numbers of mean 0 and standard deviation 1 in each channel.

    mean, std: of each channel of the training images, where white is 1. Tiles travel as they are
    stored, which for a photograph is a quarter of the bytes, and are normalised on their device.
    value_range: the smallest and the largest value of each channel of the training images, as they
    are stored. A number that is not finite, or that lies far outside this range, marks a pixel
    without data, and becomes the mean.
    """
    x = tile.to(torch.get_default_dtype()) / white(tile)
    for channel in range(x.shape[1]):
        values = x[:, channel]
        normalised = (values - mean[channel]) / std[channel]
        if value_range is not None and tile.dtype != torch.uint8:  # in which no value lies far outside
            smallest, largest = value_range
            lowest, highest = far_limits(smallest[channel], largest[channel])
            has_data = (values >= lowest / white(tile)) & (values <= highest / white(tile))
            normalised = normalised.where(has_data, 0)
        x[:, channel] = normalised
    if tile.is_floating_point():
        x.nan_to_num_(nan=0, posinf=0, neginf=0)
    return x


def far_limits(smallest: float, largest: float) -> tuple[float, float]:
    """The limits beyond which a value is far outside a range: farther from it than it is wide."""
    width = largest - smallest
    return smallest - width, largest + width


def without_outliers(values: Sequence[float]) -> tuple[float, float]:
    """The smallest and the largest of some values, but not one that is far outside all others.

    values: sorted, and all different. For example heights in metres, where -9999 stands for what was not measured:

        -9999 . . . . . . . . . . . . . . . . . . . . . 12 13 40 250     ->  12 and 250

    Without -9999 they are 238 metres from each other, and it lies farther than that below 12.
    """
    smallest, largest = values[0], values[-1]
    if len(values) > 2:
        lowest, highest = far_limits(values[1], values[-1])
        if smallest < lowest:
            smallest = values[1]
        lowest, highest = far_limits(values[0], values[-2])
        if largest > highest:
            largest = values[-2]
    return smallest, largest


class Extremes:
    """The two smallest and the two largest values of each channel of some images, as they are
    stored. Two, so that `without_outliers` can tell whether the last one is far outside the others.

    dtype: of the images. Of uint8, in which no value lies far outside, only the smallest and the largest are kept.
    """

    def __init__(self, channels: int, dtype: np.dtype):
        self.keep = 2
        if dtype == np.uint8:
            self.keep = 1
        self.values = [[] for _ in range(channels)]  # of each channel, sorted

    def add(self, channel: int, values: np.ndarray):
        """values: (n,), finite, and n may be 0."""
        if values.size == 0:
            return
        smallest, largest = values.min(), values.max()
        self.merge(channel, [float(smallest), float(largest)])
        if self.keep == 2:
            inner = values[(values > smallest) & (values < largest)]
            if inner.size > 0:
                self.merge(channel, [float(inner.min()), float(inner.max())])

    def add_all(self, other: "Extremes"):
        for channel, values in enumerate(other.values):
            self.merge(channel, values)

    def merge(self, channel: int, values: list[float]):
        """Keeps the outermost of these values and of those that are known."""
        known = sorted(set(self.values[channel] + values))
        if len(known) > 2 * self.keep:
            known = known[:self.keep] + known[-self.keep:]
        self.values[channel] = known

    def value_range(self) -> list[list[float]]:
        """The smallest value of each channel, and the largest."""
        smallest = []
        largest = []
        for values in self.values:
            smallest.append(values[0])
            largest.append(values[-1])
        return [smallest, largest]


def range_line(found: Sequence[Sequence[float]], trained: Sequence[Sequence[float]]) -> str | None:
    """A line, if the values of some images are far outside the range of the training images, or if
    those of all channels fill less than a hundredth of it; otherwise None. Both are ranges as in
    `Extremes`."""
    narrow = 0
    channels = len(trained[0])
    for channel in range(channels):
        smallest, largest = found[0][channel], found[1][channel]
        first, last = trained[0][channel], trained[1][channel]
        lowest, highest = far_limits(first, last)
        if smallest < lowest or largest > highest:
            return (f"values from {smallest:g} to {largest:g}, but the training images have {first:g} to {last:g} (in "
                    f"channel {channel}); bring them to the same range, unless a value marks pixels without data")
        if largest - smallest < (last - first) / 100:
            narrow += 1
    if narrow == channels:
        return (f"values from {min(found[0]):g} to {max(found[1]):g}, but the training images have {min(trained[0]):g} "
                f"to {max(trained[1]):g}; bring them to the same range")
    return None


def is_finite(values: np.ndarray) -> np.ndarray:
    """Which values are finite in float32: not nan, not infinite, and not beyond 3e38."""
    return torch.from_numpy(values).float().isfinite().numpy()


def counted_pixels(image: np.ndarray, path: Path, mask: np.ndarray) -> Iterator[np.ndarray]:
    """The pixels of an image that count in its mask, (n,C) in each block. DataError: one is not finite in float32."""
    top = 0
    for block in blocks(image):
        counts = mask[top:top + len(block)] != IGNORE
        top += len(block)
        pixels = block.reshape(-1, block.shape[2])
        if not counts.all():
            pixels = block[counts]
        if pixels.dtype.kind == "f" and not is_finite(pixels).all():
            raise DataError(f"{path}: holds nan, inf or numbers beyond 3e38; give these pixels {IGNORE} in the mask, "
                            "so that they do not count, or replace them")
        yield pixels
