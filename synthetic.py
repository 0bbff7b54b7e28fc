"""The synthetic data set of the paper: a picture that no tile can understand alone.

    image                      mask                       The picture shows two discs, in two different tiles.
    +-----------+-----------+  +-----------+-----------+  The mask joins them by a straight line: a tile sees
    |           |           |  |           |           |  at most one end of it, so it cannot know where the
    |   O       |           |  |   O--__   |           |  line goes, or that it crosses at all, unless it is
    |           |           |  |       --__|           |  told where the other disc is.
    +-----------+-----------+  +-----------+--__-------+
    |           |           |  |           |    --__   |  Classes: 0 background, 1 line, 2 circle.
    |           |       O   |  |           |        O  |
    +-----------+-----------+  +-----------+-----------+

Source: Verburg, Heinlein, Cyr, "DDU-Net" (arXiv 2407.21266). `python synthetic.py` draws a sheet of examples.
This file imports nothing but numpy and torch: copy it.
"""

import numpy as np
import torch
from torch.utils.data import Dataset

SPLITS = ("train", "val", "test")


class LinesAndCircles(Dataset):
    """`length` pairs of an image (1,H,W), float32 of 0 and 1, and a mask (H,W), uint8 class indices.

    Pair i depends on (seed, split, i) alone. The tiles meant here are those that keep the discs apart, `grid`
    (rows, columns) of them; a network may cut the image otherwise. The discs are in different tiles, at most
    `max_apart` tiles apart in either direction if given. Lengths are in pixels.

    ValueError: fewer than two tiles, tiles too small for a disc, or `max_apart` below 1.
    """

    channels = 1
    classes = ("background", "line", "circle")
    colors = ((0.86, 0.86, 0.82), (0.90, 0.45, 0.13), (0.16, 0.38, 0.60))

    def __init__(self, length: int, size: tuple[int, int] = (64, 64), grid: tuple[int, int] = (2, 2),
                 split: str = "train", seed: int = 0, max_apart: int | None = None, radius: int = 4, line_width: int = 3):
        rows, columns = grid
        self.tile = size[0] // max(rows, 1), size[1] // max(columns, 1)
        if rows < 1 or columns < 1 or rows * columns < 2 or min(self.tile) < 2 * radius + 1:
            raise ValueError(f"an image of {size[0]}x{size[1]} in {rows}x{columns} tiles: two discs of "
                             f"{2 * radius + 1} pixels need at least two tiles of that size")
        if max_apart is not None and max_apart < 1:
            raise ValueError(f"max_apart {max_apart}: discs in different tiles are at least 1 tile apart")
        self.grid, self.max_apart = grid, max(grid) if max_apart is None else max_apart
        self.length, self.size, self.radius, self.line_width = length, size, radius, line_width
        self.key = seed, SPLITS.index(split)
        self.y, self.x = np.ogrid[:size[0], :size[1]]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= i < self.length:
            raise IndexError(i)  # ends a plain `for image, mask in dataset`
        rng = np.random.default_rng((*self.key, i))
        pair = self.draw_tiles(rng)
        room = np.array(self.tile) - 2 * self.radius  # where in its tile a disc can have its centre
        (y0, x0), (y1, x1) = pair * self.tile + self.radius + rng.integers(room, size=(2, 2))

        y, x, dy, dx = self.y - y0, self.x - x0, y1 - y0, x1 - x0
        length2 = dy * dy + dx * dx
        along, across = dy * y + dx * x, dx * y - dy * x  # distances, each times the length of the line
        line = (2 * abs(across) <= self.line_width * np.sqrt(length2)) & (along >= 0) & (along <= length2)
        discs = (y**2 + x**2 <= self.radius**2) | ((self.y - y1) ** 2 + (self.x - x1) ** 2 <= self.radius**2)

        mask = np.where(discs, 2, line).astype(np.uint8)
        return torch.from_numpy(discs[None].astype(np.float32)), torch.from_numpy(mask)

    def draw_tiles(self, rng: np.random.Generator) -> np.ndarray:
        """((row, column), (row, column)) of two tiles; all pairs that are close enough are equally likely."""
        tiles = self.grid[0] * self.grid[1]
        while True:
            first, second = divmod(rng.integers(tiles * (tiles - 1)), tiles - 1)
            second += second >= first  # so that it is never the same tile
            pair = np.array([divmod(first, self.grid[1]), divmod(second, self.grid[1])])
            if abs(pair[0] - pair[1]).max() <= self.max_apart:
                return pair


def draw_examples(path: str, count: int = 8):
    """Draws images above their masks, tiles marked."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap

    data = LinesAndCircles(count)
    figure, axes = plt.subplots(2, count, figsize=(1.5 * count, 3.2), layout="constrained")
    for (image, mask), (above, below) in zip(data, axes.T):
        above.imshow(image[0], cmap="gray")
        below.imshow(mask, cmap=ListedColormap(data.colors), interpolation="nearest")
        for axis in (above, below):
            axis.axhline(data.tile[0] - 0.5, color="tab:red", linewidth=0.8)
            axis.axvline(data.tile[1] - 0.5, color="tab:red", linewidth=0.8)
            axis.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("image")
    axes[1, 0].set_ylabel("mask")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    draw_examples("synthetic.png")
    print("wrote synthetic.png")
