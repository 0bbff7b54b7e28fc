"""How images of any size are cut into tiles: those of training as --grid says, others into tiles of about that size."""

import functools
import math
from collections.abc import Sequence

from decompose import Tiling
from support.images import DataError

cached_tiling = functools.cache(Tiling)  # it is the same for most images
SMALL = 256  # pixels; in tiles of 32x32 a CPU takes three times as long for an image


def build_tiling(config: dict, size: Sequence[int], grid: Sequence[int] | None = None) -> Tiling:
    """How an image of a size (H,W) is cut. ValueError: it cannot be.

    As `grid` says, if it is given. An image of the size of training is cut as --grid says. Any
    other is cut into tiles that are no larger than those; but an image larger than in training,
    into tiles of up to 256 pixels to a side, where those of training are smaller. Where several
    processes share an image, there is a tile for each.
    """
    if grid is None:
        grid = grid_for(config, size)
    return cached_tiling(tuple(size), tuple(grid), 2 ** config["depth"], config["overlap"])


def grid_for(config: dict, size: Sequence[int]) -> Sequence[int]:
    """Rows and columns of tiles for an image of a size (H,W), as `build_tiling` says."""
    trained = config["image_size"]
    if tuple(size) == tuple(trained):
        return config["grid"]
    cell = 2 ** config["depth"]
    tiles = []  # rows and columns
    for side, trained_side, trained_tiles in zip(size, trained, config["grid"]):
        pixels = math.ceil(trained_side / cell / trained_tiles) * cell  # of the largest tile of training
        if math.prod(size) > math.prod(trained):
            pixels = max(pixels, SMALL)
        tiles.append(math.ceil(side / pixels))
    rows, columns = tiles
    while rows * columns < config["image_processes"]:  # each of them needs a tile
        if size[0] / rows >= size[1] / columns:
            rows += 1
        else:
            columns += 1
    return rows, columns


def check_sizes(config: dict, sizes: dict[tuple[int, int], str]) -> tuple[int, int]:
    """The size that --grid cuts: that of the crops, or else the largest of the training images.

    sizes: those of the training images, with the name of an image of each size. DataError: an image cannot be cut, is
    smaller than --crop, or several cannot be in one batch.
    """
    largest = max(sizes, key=math.prod)
    crop = config["crop"]
    if crop:
        for (height, width), name in sizes.items():
            if height < crop[0] or width < crop[1]:
                raise DataError(f"{name}: {height}x{width} pixels are fewer than --crop {crop[0]}x{crop[1]}; take a "
                                "smaller crop")
        largest = tuple(crop)
        sizes = {largest: "--crop"}
    if len(sizes) > 1 and config["batch_size"] > 1:
        raise DataError(f"{sizes[largest]}: other images are smaller, and images of several sizes need --batch-size 1 "
                        "or --crop HxW")
    for size, name in sizes.items():
        check_tiling({**config, "image_size": largest}, size, name)
    return largest


def check_tiling(config: dict, size: tuple[int, int], name: str):
    """DataError: an image of this size and name cannot be cut."""
    try:
        build_tiling(config, size)
    except ValueError as error:
        raise DataError(f"{name}: {error}; take another --grid, --depth, --overlap or --image-processes") from None
