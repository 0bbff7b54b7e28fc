"""Pictures of a run: how it learned, and what it sees. Knows arrays and colours, nothing of models or devices."""

import matplotlib
import numpy as np

matplotlib.use("Agg")  # draws into files and needs no screen
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator


def draw_curves(path, rows: list[dict], classes: list[str], colors: list):
    """The rows of log.csv: losses on the left, the validation IoU of each class on the right."""
    epochs = [row["epoch"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name in ("train_loss", "val_loss"):
        left.plot(epochs, [row[name] for row in rows], "o-", label=name.replace("_", " "))
    left.set(xlabel="epoch", ylabel="loss", yscale="log")
    for name, color in zip(classes, colors):
        right.plot(epochs, [row[f"val_iou_{name}"] for row in rows], "o-", label=name, color=color)
    right.set(xlabel="epoch", ylabel="validation IoU", ylim=(0, 1.02))
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend()
    save(figure, path)


def draw_predictions(path, columns: dict[str, list], boxes: list[list], classes: list[str], colors: list):
    """A picture per cell: `columns` maps a title to images (C,H,W), or to masks (H,W) of class indices.
    boxes: of each row of pictures, (top, bottom, left, right) of every tile, drawn as lines."""
    heights = [picture.shape[-2] / picture.shape[-1] for picture in next(iter(columns.values()))]  # for a width of 1
    width = 2.2 * np.clip(len(heights) / sum(heights), 0.25, 2)  # inches: more for wide pictures, less for tall ones
    figure, axes = plt.subplots(len(heights), len(columns), height_ratios=heights, squeeze=False, layout="constrained",
                                figsize=(width * len(columns), width * sum(heights) + 1))
    for column, (title, pictures) in zip(axes.T, columns.items()):
        column[0].set_title(title)
        for cell, picture, tiles in zip(column, pictures, boxes):
            show(cell, picture, tiles, colors)
    figure.legend(handles=[Patch(color=color, label=name, ec="gray") for name, color in zip(classes, colors)],
                  loc="outside lower center", ncols=min(len(classes), 4), frameon=False)
    save(figure, path)


def show(axes, picture, boxes: list, colors: list):
    """An image (C,H,W) in grey or colour, or a mask (H,W) in the colours of its classes. Pixels that do not count are
    grey."""
    picture = np.asarray(picture)
    if picture.ndim == 3:
        axes.imshow(visible(picture))
    else:
        classes = ListedColormap(colors).with_extremes(over="gray")
        axes.imshow(picture, cmap=classes, vmin=-0.5, vmax=len(colors) - 0.5, interpolation="nearest")
    height, width = picture.shape[-2:]
    for top, _, left, _ in boxes:
        axes.axhline(top - 0.5, color="tab:red", linewidth=0.7)
        axes.axvline(left - 0.5, color="tab:red", linewidth=0.7)
    axes.set(xticks=[], yticks=[], xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))


def visible(image: np.ndarray) -> np.ndarray:
    """(C,H,W) of any numbers -> (H,W,3) from 0 to 1: grey for one or two channels, else the first three."""
    image = image[:3] if len(image) > 2 else image[[0, 0, 0]]
    smallest, largest = (0, 255) if image.dtype == np.uint8 else (float(image.min()), float(image.max()))
    return ((image.astype(np.float32) - smallest) / (largest - smallest or 1)).transpose(1, 2, 0)


def save(figure, path):
    figure.savefig(path, dpi=110)
    plt.close(figure)
