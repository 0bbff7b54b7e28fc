"""Pictures of a run: how it learned, and what it sees. This file knows nothing of models, tiles or devices.

It makes its figures without pyplot, so that no window and no notebook is needed, whatever MPLBACKEND says.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image  # comes with matplotlib


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
    left.legend()
    for name, color in zip(classes, colors):
        scores = column(rows, f"val_iou_{name}")
        right.plot(epochs, scores, "o-", label="class", color=color)
    right.set_ylabel("validation IoU")
    right.set_ylim(0, 1.02)
    write_names(right.legend(), classes)
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    save(figure, path)


def write_names(legend: Legend, names: list[str]):
    """Gives a legend other names, as they are: as labels, matplotlib would take a $ for the
    beginning of a formula, and leave out a name that begins with an underscore."""
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)


def column(rows: list[dict], name: str) -> list:
    return [row[name] for row in rows]


def downsampling(size: Sequence[int], longest: int) -> int:
    """The step at which to take pixels of an image of a size (H,W), so that its picture has at most
    `longest` on a side."""
    return math.ceil(max(size) / longest)


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
    figure = Figure(figsize=size, layout="constrained")
    table = figure.subplots(len(heights), len(columns), height_ratios=heights, squeeze=False)
    for j, title in enumerate(columns):
        table[0, j].set_title(title)
        for i, picture in enumerate(columns[title]):
            show(table[i, j], picture, boxes[i], colors)
    patches = []
    for color in colors:
        patches.append(Patch(color=color, label="class", ec="gray"))
    legend = figure.legend(
        handles=patches,
        loc="outside lower center",
        ncols=min(len(classes), 4),
        frameon=False,
    )
    write_names(legend, classes)
    save(figure, path)


def show(axes, picture, boxes: Sequence, colors: list):
    """Shows an image (C,H,W) in grey or colour, or a mask (H,W) in the colours of its classes.

    Pixels of a mask that do not count are grey. The borders between the boxes of tiles are red lines.
    """
    picture = np.asarray(picture)
    if picture.ndim == 3:
        axes.imshow(visible(picture))
    else:
        palette = ListedColormap(colors).with_extremes(over="gray")
        limits = {"vmin": -0.5, "vmax": len(colors) - 0.5}
        axes.imshow(picture, cmap=palette, interpolation="nearest", **limits)
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
    is grey. Pixels without data are black or white: those of nan, and of a value far outside all others.
    """
    if len(image) >= 3:
        image = image[:3]
    else:
        image = image[[0, 0, 0]]
    if image.dtype == np.uint8:
        smallest, largest = 0, 255
    else:
        with np.errstate(over="ignore"):  # what is too large for float32 is no data either
            image = image.astype(np.float32)
        smallest, largest = contrast(image)
    image = np.nan_to_num(image, nan=smallest).clip(smallest, largest)
    image = image.astype(np.float32).transpose(1, 2, 0)
    return (image - smallest) / (largest - smallest)


def contrast(image: np.ndarray) -> tuple[float, float]:
    """The values to show in black and in white: the smallest and the largest that are not far outside the others."""
    values = np.unique(image[np.isfinite(image)])
    if len(values) < 2:
        return 0.0, 1.0
    quarter, half, three_quarters = np.quantile(values, [0.25, 0.5, 0.75])
    reach = 10 * (three_quarters - quarter)
    inside = values[abs(values - half) <= reach]
    return float(inside.min()), float(inside.max())


def save(figure: Figure, path: Path):
    figure.savefig(path, dpi=110)


# Pictures of one image, pixel by pixel

def with_palette(mask: np.ndarray, colors: list) -> Image.Image:
    """A picture that holds class indices (H,W) and shows colours."""
    picture = Image.fromarray(mask)
    palette = np.rint(255 * np.array(colors)).astype(np.uint8)
    picture.putpalette(palette.tobytes())
    return picture


def overlay(image: np.ndarray, mask: np.ndarray, colors: list) -> Image.Image:
    """An image (H,W,C), half covered by the colours of its classes (H,W); at most 2048 pixels on a side."""
    step = downsampling(mask.shape, 2048)
    below = 255 * visible(image[::step, ::step].transpose(2, 0, 1))
    above = with_palette(mask[::step, ::step], colors).convert("RGB")
    return Image.blend(Image.fromarray(below.astype(np.uint8)), above, 0.5)
