"""How images of any size are cut into tiles: those of training as --grid says, others into tiles of about that size."""

import functools
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from decompose import Tiling
from support import processes
from support.image_files import DataError

SMALL = 256  # pixels; in tiles of 32x32 a CPU takes three times as long for an image


@functools.cache
def cached_tiling(size: tuple[int, int], grid: tuple[int, int], cell: int, overlap: int) -> Tiling:
    return Tiling(size, grid, cell, overlap)


def build_tiling(config: dict, size: Sequence[int], grid: Sequence[int] | None = None) -> Tiling:
    """How an image of a size (H,W) is cut. ValueError: it cannot be.

    As `grid` says, if it is given. An image of the size of training is cut as --grid says. Any
    other is cut into tiles that are no larger than those; but an image larger than in training,
    into tiles of up to 256 pixels to a side, where those of training are smaller. Where several
    processes share an image, there is a tile for each.
    """
    cell = 2 ** config["depth"]
    if grid is None:
        grid = grid_for(config, size)
    return cached_tiling(tuple(size), tuple(grid), cell, config["overlap"])


def grid_for(config: dict, size: Sequence[int]) -> Sequence[int]:
    """Rows and columns of tiles for an image of a size (H,W), as `build_tiling` says."""
    trained = tuple(config["image_size"])
    if tuple(size) == trained:
        return config["grid"]
    tiling = cached_tiling(trained, tuple(config["grid"]), 2 ** config["depth"], 0)
    top, bottom, left, right = tiling.boxes[0]
    height, width = bottom - top, right - left
    if math.prod(size) > math.prod(trained):
        height, width = max(height, SMALL), max(width, SMALL)
    rows, columns = math.ceil(size[0] / height), math.ceil(size[1] / width)
    while rows * columns < config["image_processes"]:  # each of them needs a tile
        if size[0] / rows >= size[1] / columns:
            rows += 1
        else:
            columns += 1
    return rows, columns


def check_sizes(config: dict, sizes: dict[tuple[int, int], str], images: int) -> tuple[int, int]:
    """The size that --grid cuts: that of the crops, or else the largest of the training images.

    sizes: those of the training images, with the name of an image of each size; images: how many there are.
    DataError: an image cannot be cut, or several cannot be in one batch.
    """
    if config["crop"]:
        sizes = {tuple(config["crop"]): "--crop"}
    if len(sizes) > 1 and config["batch_size"] > 1:
        (one, one_name), (other, other_name) = itertools.islice(sizes.items(), 2)
        raise DataError(f"{other_name}: {other[0]}x{other[1]} pixels, but {one_name} has {one[0]}x{one[1]}; images of "
                        "several sizes need --batch-size 1 or --crop HxW")
    largest = max(sizes, key=math.prod)
    for size in sizes:
        try:
            tiling = build_tiling(config | {"image_size": largest}, size)
        except ValueError as error:
            rows, columns = config["grid"]
            raise DataError(f"{sizes[largest]}: --grid {rows}x{columns} --overlap {config['overlap']} --depth "
                            f"{config['depth']}: {error}; take another --grid, --depth or --overlap") from None
        if has_tile_of_one_cell(tiling) and smallest_batch(config, images) == 1:
            raise DataError("a tile is a single cell, and a process has a batch of a single image: batch norm needs at "
                            "least two numbers; take another --batch-size, a coarser --grid or a smaller --depth")
    return largest


def smallest(config: dict, sizes: dict[str, dict[tuple[int, int], Path]]) -> tuple[str, int, int]:
    """Name, height and width of the image with the fewest cells, of all that are cut.

    sizes: for each split {(H, W): an image of that size}.
    """
    candidates = []
    for split, paths in sizes.items():
        for size, path in paths.items():
            name = path.name
            if split == "train" and config["crop"]:
                size, name = config["crop"], "--crop"
            candidates.append((number_of_cells(config, size), name, size))
    _, name, (height, width) = min(candidates)
    return name, height, width


def number_of_cells(config: dict, size: Sequence[int]) -> int:
    cell = 2 ** config["depth"]
    return math.ceil(size[0] / cell) * math.ceil(size[1] / cell)


def check_smallest(config: dict):
    """DataError: the smallest image has too few cells to give each of the processes that share it a tile."""
    name, height, width = config["smallest_image"]
    cells = number_of_cells(config, (height, width))
    if cells < config["image_processes"]:
        cell = 2 ** config["depth"]
        raise DataError(f"{name}: {height}x{width} pixels, {cells} cells of {cell}x{cell}, cannot be cut into a tile "
                        f"for each of --image-processes {config['image_processes']}; take at most {cells}")


def has_tile_of_one_cell(tiling: Tiling) -> bool:
    for top, bottom, left, right in tiling.coarse.halos:
        if bottom - top == 1 and right - left == 1:
            return True
    return False


def smallest_batch(config: dict, images: int) -> int:
    """The fewest images that a process can have in a step, whole or in part."""
    full = min(images, config["batch_size"])
    last = images % config["batch_size"] or full
    groups = processes.world_size() // config["image_processes"]
    return max(min(full, last) // groups, 1)
