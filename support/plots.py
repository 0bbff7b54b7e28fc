"""Pictures of a run: how it learned, and what it sees. This file knows nothing of models, tiles or devices.

It makes its figures without pyplot, so that no window and no notebook is needed, whatever MPLBACKEND says.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image  # comes with matplotlib

from support.checkpoints import atomic_write


def draw_curves(path: Path, rows: list[dict], classes: list[str], colors: list):
    """Draws the rows of log.csv: the losses on the left, the validation IoU of each class on the right."""
    epochs = column(rows, "epoch")
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for split in ("train", "val"):
        losses = column(rows, f"{split}_loss")
        left.plot(epochs, losses, "o-", label=f"{split} loss")
    left.set_ylabel("loss")
    left.set_yscale("log")
    for name, color in zip(classes, colors):
        scores = column(rows, f"val_iou_{name}")
        right.plot(epochs, scores, "o-", label=label_of(name), color=color)
    right.set_ylabel("validation IoU")
    right.set_ylim(0, 1.02)
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend()
    save(figure, path)


def label_of(name: str) -> str:
    """The name of a class for a legend. As it is, a $ would begin a formula, and a name that begins with an underscore
    would be left out."""
    return " " + name.replace("$", r"\$")


def column(rows: list[dict], name: str) -> list:
    return [row[name] for row in rows]


def downsampling(size: Sequence[int], longest: int) -> int:
    """The step at which to take pixels of an image of a size (H,W), so that its picture has at most
    `longest` on a side."""
    return math.ceil(max(size) / longest)


def draw_predictions(path: Path, columns: dict[str, list], boxes: list, classes: list[str], colors: list):
    """Draws a table of pictures, with the borders between tiles as red lines.

    columns: for each title the pictures below it, among them "image". A picture is an image (C,H,W), or a mask (H,W) of
    class indices.
    boxes: for each row of the table, the (top, bottom, left, right) of every tile, in pixels of its pictures.
    """
    rows = len(boxes)
    height, width = columns["image"][0].shape[-2:]
    row_height = 2.5 * min(height / width, 3)  # in inches; a picture is 2.5 wide
    size = (2.5 * len(columns), row_height * rows + 1)
    figure = Figure(figsize=size, layout="compressed")
    table = figure.subplots(rows, len(columns), squeeze=False)
    for j, title in enumerate(columns):
        table[0, j].set_title(title)
        for i in range(rows):
            show(table[i, j], columns[title][i], boxes[i], colors)
    patches = []
    for name, color in zip(classes, colors):
        patch = Patch(color=color, label=label_of(name), ec="gray")
        patches.append(patch)
    figure.legend(
        handles=patches,
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    save(figure, path)


def show(axes, picture, boxes: Sequence, colors: list):
    """Shows an image (C,H,W) in grey or colour, or a mask (H,W) in the colours of its classes.

    Pixels of a mask that do not count are grey. The borders between the boxes of tiles are red lines.
    """
    picture = np.asarray(picture)
    if picture.ndim == 3:
        picture = visible(picture)
    else:
        picture = paint(picture, colors)
    axes.imshow(picture, interpolation="nearest")
    for top, _, left, _ in boxes:
        axes.axhline(top - 0.5, color="tab:red", linewidth=0.7)
        axes.axvline(left - 0.5, color="tab:red", linewidth=0.7)
    axes.set(xticks=[], yticks=[])


def visible(image: np.ndarray) -> np.ndarray:
    """An image (C,H,W) of any numbers -> (H,W,3), from 0 to 1, as matplotlib shows it.

    Of three channels or more, the first three are red, green and blue. Of one or two, the first one is grey. Except in
    photographs, black and white are near the smallest and the largest of the numbers that occur, each counted once,
    so that pixels without data, such as -9999, seldom matter; nan is black.
    """
    if len(image) >= 3:
        image = image[:3]
    else:
        image = image[[0, 0, 0]]
    black, white = 0, 255
    if image.dtype != np.uint8:
        values = np.unique(image[np.isfinite(image)]).astype(float)
        if len(values) > 1:
            black, white = np.percentile(values, [1, 99])
    image = np.nan_to_num(image, nan=black).clip(black, white)
    return (image.transpose(1, 2, 0) - black) / (white - black)


def save(figure: Figure, path: Path):
    with atomic_write(Path(path)) as unfinished:
        figure.savefig(unfinished, dpi=110)


# Pictures of one image, pixel by pixel

def paint(mask: np.ndarray, colors: list) -> np.ndarray:
    """Class indices (H,W) -> their colours (H,W,3), from 0 to 1. All other indices are grey."""
    palette = np.full((256, 3), 0.5)
    palette[:len(colors)] = colors
    return palette[mask.astype(int)]  # of True and False, it would take the rows instead of the colours


def with_palette(mask: np.ndarray, colors: list) -> Image.Image:
    """A picture that holds class indices (H,W) and shows colours."""
    picture = Image.fromarray(mask)
    palette = np.rint(255 * np.array(colors)).astype(np.uint8)
    picture.putpalette(palette.tobytes())
    return picture


def overlay(image: np.ndarray, mask: np.ndarray, colors: list) -> Image.Image:
    """An image (H,W,C), half covered by the colours of its classes (H,W); at most 2048 pixels on a side."""
    step = downsampling(mask.shape, 2048)
    below = visible(image[::step, ::step].transpose(2, 0, 1))
    above = paint(mask[::step, ::step], colors)
    picture = 255 * (below + above) / 2
    return Image.fromarray(picture.astype(np.uint8))
