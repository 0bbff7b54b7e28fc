"""Which process holds what: a batch of four images over four processes, in the three ways that torchrun can share it.

    python -m experiments.sharing       # seconds

Each image is cut into 4x4 tiles. Which process has which tile is asked of the functions that
train.py uses. Writes experiments/sharing.png.
"""

from unittest import mock

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

from experiments.common import HERE
from support import plots, processes

WORLD_SIZE = 4
IMAGES = 4
SIDE = 4  # tiles
PANELS = {  # --image-processes: (the question, the answer)
    1: ("Too many images", "each process has its own images"),
    2: ("Both", "two groups have their own images,\ntwo processes share each image"),
    4: ("Images too large", "all processes share each image"),
}


def holders(image_processes: int) -> list[list[int]]:
    """For each image of a batch, the process that holds each of its tiles, row-major."""
    images = [[None] * SIDE**2 for _ in range(IMAGES)]
    for rank in range(WORLD_SIZE):
        with mock.patch.multiple(processes, rank=mock.Mock(return_value=rank), image_processes=image_processes,
                                 world_size=mock.Mock(return_value=WORLD_SIZE)):
            for i in range(processes.group(), IMAGES, processes.groups()):
                for tile in processes.own_tiles(SIDE**2):
                    images[i][tile] = rank
    return images


def draw_image(axes, left: float, bottom: float, tiles: list[int]):
    """An image as a square of tiles, each in the colour of its process and with the number of the process."""
    for number, rank in enumerate(tiles):
        row, column = divmod(number, SIDE)
        x = left + column
        y = bottom + SIDE - 1 - row
        axes.add_patch(Rectangle((x, y), 1, 1, facecolor=f"C{rank}", edgecolor="white", alpha=0.75))
        axes.text(x + 0.5, y + 0.5, str(rank), ha="center", va="center", fontsize=8, color="white")
    axes.add_patch(Rectangle((left, bottom), SIDE, SIDE, fill=False, edgecolor="black"))


def main():
    figure, panels = plt.subplots(1, len(PANELS), figsize=(11, 5.2), layout="constrained")
    for axes, (image_processes, (question, answer)) in zip(panels, PANELS.items()):
        for i, tiles in enumerate(holders(image_processes)):
            row, column = divmod(i, 2)
            draw_image(axes, column * (SIDE + 1), (1 - row) * (SIDE + 1), tiles)
        axes.set(xlim=(-0.2, 2 * SIDE + 1.2), ylim=(-2, 2 * SIDE + 3.5), aspect="equal")
        title = f"{question}?\n--image-processes {image_processes}"
        axes.text(SIDE + 0.5, 2 * SIDE + 1.5, title, ha="center", va="bottom", fontsize=12)
        axes.text(SIDE + 0.5, -0.5, answer, ha="center", va="top")
        axes.axis("off")
    path = HERE / "sharing.png"
    plots.save(figure, path)
    print(f"See {path}")


if __name__ == "__main__":
    main()
