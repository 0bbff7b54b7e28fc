"""Pictures of a run: how it learned, and what it sees. This file knows tiles and colours, but no models or devices."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from torch import Tensor

from decompose import Tiling
from support.values import is_finite, without_outliers

matplotlib.use("Agg")  # draws into files and needs no screen
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.legend import Legend
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator


def draw_curves(path: Path, rows: list[dict], classes: list[str], colors: list):
    """Draws the rows of log.csv: the losses on the left, the validation IoU of each class on the right."""
    epochs = column(rows, "epoch")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot(epochs, column(rows, "train_loss"), "o-", label="train loss")
    left.plot(epochs, column(rows, "val_loss"), "o-", label="val loss")
    left.set_xlabel("epoch")
    left.set_ylabel("loss")
    left.set_yscale("log")
    for i, (name, color) in enumerate(zip(classes, colors)):
        right.plot(epochs, column(rows, f"val_iou_{name}"), "o-", label=f"class {i}", color=color)
    right.set_xlabel("epoch")
    right.set_ylabel("validation IoU")
    right.set_ylim(0, 1.02)
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    left.legend()
    write_names(right.legend(), classes)
    save(figure, path)


def write_names(legend: Legend, names: list[str]):
    """Gives a legend other names, as they are: as labels, matplotlib would take a $ for the
    beginning of a formula, and leave out a name that begins with an underscore."""
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)


def column(rows: list[dict], name: str) -> list:
    return [row[name] for row in rows]


def thinning(size: Sequence[int], longest: int) -> int:
    """The step at which to take pixels of an image of a size (H,W), so that its picture has at most
    `longest` on a side."""
    return math.ceil(max(size) / longest)


class Thinned:
    """Every step-th row and column of an image, which are enough for a picture, when it is cut into tiles.

    What is thinned is copied: the image itself may be larger than the memory.
    """

    def __init__(self, tiling: Tiling, longest: int = 1024):
        self.tiling = tiling
        self.step = thinning(tiling.size, longest)

    def image(self, image: Tensor) -> Tensor:
        """The picture of an image or a mask (...,H,W)."""
        return image[..., ::self.step, ::self.step].clone()

    def write(self, i: int, tile: Tensor, picture: Tensor):
        """Writes what the picture (H,W) shows of tile i (h,w), which has no overlap. That may be
        nothing, if it is small."""
        top, _, left, _ = self.tiling.boxes[i]
        first_row = -top % self.step  # the picture has the rows 0, step, 2 step, ... of the image, not of the tile
        first_column = -left % self.step
        part = tile[first_row::self.step, first_column::self.step]
        y = (top + first_row) // self.step
        x = (left + first_column) // self.step
        target = picture[y:y + part.shape[0], x:x + part.shape[1]]
        height, width = target.shape
        target.copy_(part[:height, :width])  # without what pads the last tiles

    def boxes(self) -> list[tuple]:
        """The (top, bottom, left, right) of every tile in pixels of the picture, which need not be whole."""
        boxes = []
        for top, bottom, left, right in self.tiling.boxes:
            boxes.append((top / self.step, bottom / self.step, left / self.step, right / self.step))
        return boxes


def draw_predictions(path: Path, columns: dict[str, list], boxes: list, classes: list[str], colors: list):
    """Draws a table of pictures, with the borders between tiles as red lines.

    columns: for each title the pictures below it. A picture is an image (C,H,W), or a mask (H,W) of class indices.
    boxes: for each row of the table, the (top, bottom, left, right) of every tile, in pixels of its pictures.
    """
    heights = []  # of each row, when a picture is 1 wide
    for picture in list(columns.values())[0]:
        height, width = picture.shape[-2:]
        heights.append(height / width)
    total = sum(heights)
    inches = 2.2 * np.clip(len(heights) / total, 0.25, 2)  # width of a picture: more for wide ones, less for tall ones
    size = (inches * len(columns), inches * total + 1)
    figure, table = plt.subplots(
        len(heights),
        len(columns),
        figsize=size,
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for j, title in enumerate(columns):
        table[0, j].set_title(title)
        for i, picture in enumerate(columns[title]):
            show(table[i, j], picture, boxes[i], colors)
    patches = []
    for i, color in enumerate(colors):
        patches.append(Patch(color=color, label=f"class {i}", ec="gray"))
    legend = figure.legend(handles=patches, loc="outside lower center", ncols=min(len(classes), 4), frameon=False)
    write_names(legend, classes)
    save(figure, path)


def show(axes, picture, boxes: list, colors: list):
    """Shows an image (C,H,W) in grey or colour, or a mask (H,W) in the colours of its classes.

    Pixels of a mask that do not count are grey. The borders between the boxes of tiles are red lines.
    """
    picture = np.asarray(picture)
    if picture.ndim == 3:
        axes.imshow(visible(picture))
    else:
        palette = ListedColormap(colors).with_extremes(over="gray")
        axes.imshow(picture, cmap=palette, vmin=-0.5, vmax=len(colors) - 0.5, interpolation="nearest")
    for top, _, left, _ in boxes:
        axes.axhline(top - 0.5, color="tab:red", linewidth=0.7)
        axes.axvline(left - 0.5, color="tab:red", linewidth=0.7)
    height, width = picture.shape[-2:]
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    axes.set_xticks([])
    axes.set_yticks([])


def visible(image: np.ndarray) -> np.ndarray:
    """An image (C,H,W) of any numbers -> (H,W,3), float32 from 0 to 1, as matplotlib shows it.

    Of three channels or more, the first three are red, green and blue. Of one or two, the first one
    is grey. Pixels without data are black or white: those of nan, and of a value far outside all
    others.
    """
    if len(image) >= 3:
        image = image[:3]
    else:
        image = image[[0, 0, 0]]
    if image.dtype == np.uint8:
        smallest, largest = 0, 255
    else:
        finite = is_finite(image)
        values = np.unique(image[finite]).astype(float)
        smallest, largest = without_outliers(values) if len(values) > 0 else (0, 0)
        image = np.where(finite, image, smallest)
    span = largest - smallest
    if span == 0:
        span = 1
    image = (image.astype(np.float32) - smallest) / span
    return image.clip(0, 1).transpose(1, 2, 0)


def save(figure, path: Path):
    figure.savefig(path, dpi=110)
    plt.close(figure)
