"""The synthetic data set of the paper: a picture that no tile can understand alone.

    image                      mask                       The image shows two discs, in two different tiles.
    +-----------+-----------+  +-----------+-----------+  The mask joins them by a straight line. A tile sees
    |           |           |  |           |           |  at most one end of it, so it cannot know where the
    |   O       |           |  |   O--__   |           |  line goes, or that it crosses at all, unless it is
    |           |           |  |       --__|           |  told where the other disc is.
    +-----------+-----------+  +-----------+--__-------+
    |           |           |  |           |    --__   |  Classes: 0 background, 1 line, 2 circle.
    |           |       O   |  |           |        O  |
    +-----------+-----------+  +-----------+-----------+

Source: Verburg, Heinlein, Cyr, "DDU-Net" (arXiv 2407.21266). This file imports nothing but
numpy and torch: copy it.
"""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

SPLITS = ("train", "val", "test")

# The classes. To add one, write its number, name and colour here, choose its place at random in
# LinesAndCircles.__getitem__, and paint it in `draw`. That there are three is also known to experiments/common.py
# (CLASSES), the step programs of docs/steps.md, the default of plan.py's --classes, and some tests.
BACKGROUND = 0
LINE = 1
CIRCLE = 2
CLASSES = ("background", "line", "circle")
COLORS = (  # red, green, blue, from 0 to 1
    (0.86, 0.86, 0.82),
    (0.90, 0.45, 0.13),
    (0.16, 0.38, 0.60),
)


class LinesAndCircles(Dataset):
    """Pairs of an image (1,H,W), float32 zeros and ones, and a mask (H,W), uint8 class numbers.

    length: how many pairs there are. Pair i depends on the seed, the split and i alone.
    size: (H, W) of the image, in pixels.
    grid: (rows, columns) of the tiles that keep the two discs apart. A network may cut the image into other tiles.
    max_apart: by how many rows, and by how many columns, the two tiles may differ at most. None: by any number.
    radius, line_width: of the discs and of the line, in pixels.
    ValueError: there are fewer than two tiles, or they are too small for a disc, or `max_apart` is below 1.
    """

    channels = 1
    classes = CLASSES
    colors = COLORS

    def __init__(self, length: int, size: tuple[int, int] = (64, 64), grid: tuple[int, int] = (2, 2),
                 split: str = "train", seed: int = 0, max_apart: int | None = None, radius: int = 4,
                 line_width: int = 3):
        height, width = size
        rows, columns = grid
        cut = f"an image of {height}x{width} in {rows}x{columns} tiles"
        if rows < 1 or columns < 1 or rows * columns < 2:
            raise ValueError(f"{cut}: two discs in different tiles need at least two tiles")
        tile = (height // rows, width // columns)
        if min(tile) < 2 * radius + 1:
            raise ValueError(f"{cut}: a disc of {2 * radius + 1} pixels does not fit into {tile[0]}x{tile[1]}")
        if max_apart is None:
            max_apart = max(grid)
        if max_apart < 1:
            raise ValueError(f"max_apart {max_apart}: discs in different tiles are at least 1 tile apart")
        self.length = length
        self.size = size
        self.grid = grid
        self.tile = tile  # height and width, in pixels
        self.max_apart = max_apart
        self.radius = radius
        self.line_width = line_width
        self.key = (seed, SPLITS.index(split))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if not 0 <= i < self.length:
            raise IndexError(i)  # ends a plain `for image, mask in dataset`
        rng = np.random.default_rng(self.key + (i,))
        start, end = self.draw_centres(rng)
        image, mask = self.draw(start, end)
        return torch.from_numpy(image).unsqueeze(0), torch.from_numpy(mask)

    def draw(self, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The image (H,W) and the mask (H,W) of two discs, whose centres are given as (y, x) in pixels."""
        first_disc = distance_to_point(self.size, start) <= self.radius
        second_disc = distance_to_point(self.size, end) <= self.radius
        discs = first_disc | second_disc
        line = distance_to_segment(self.size, start, end) <= self.line_width / 2

        mask = np.full(self.size, BACKGROUND, dtype=np.uint8)
        mask[line] = LINE
        mask[discs] = CIRCLE  # what is drawn later covers what was drawn before
        image = discs.astype(np.float32)
        return image, mask

    def draw_centres(self, rng: np.random.Generator) -> np.ndarray:
        """((y, x), (y, x)) of the two centres, in pixels. Each disc lies in its tile as a whole."""
        tiles = self.draw_tiles(rng)
        room = np.array(self.tile) - 2 * self.radius
        in_tile = self.radius + rng.integers(room, size=(2, 2))
        return tiles * np.array(self.tile) + in_tile

    def draw_tiles(self, rng: np.random.Generator) -> np.ndarray:
        """((row, column), (row, column)) of two tiles. All pairs that are close enough are equally likely."""
        rows, columns = self.grid
        tiles = rows * columns
        while True:
            first, second = divmod(rng.integers(tiles * (tiles - 1)), tiles - 1)
            if second >= first:
                second += 1  # skips the first tile, so that the two are never the same
            pair = np.array([divmod(first, columns), divmod(second, columns)])
            if abs(pair[0] - pair[1]).max() <= self.max_apart:
                return pair


# Distances, in pixels, of all pixels of an image of a size (H, W). Points are given as (y, x).

def offsets(size: tuple[int, int], point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far each row is below a point (H,1), and how far each column is to the right of it (1,W)."""
    y = np.arange(size[0]) - point[0]
    x = np.arange(size[1]) - point[1]
    return y[:, None], x[None, :]


def distance_to_point(size: tuple[int, int], point: np.ndarray) -> np.ndarray:
    """(H,W): how far each pixel is from a point."""
    y, x = offsets(size, point)
    return np.sqrt(y**2 + x**2)


def distance_to_segment(size: tuple[int, int], start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """(H,W): how far each pixel is from the straight line between two different points. The
    distance is infinite for a pixel before the start or behind the end, so that a thick line is cut
    off straight."""
    y, x = offsets(size, start)
    dy, dx = end - start
    squared_length = dy**2 + dx**2
    along = (dy * y + dx * x) / squared_length  # 0 at the start, 1 at the end
    across = abs(dx * y - dy * x) / np.sqrt(squared_length)
    between = (along >= 0) & (along <= 1)
    return np.where(between, across, np.inf)
