"""The idea in a few seconds: one image on its way through a trained network, as an animated picture.

    OMP_NUM_THREADS=1 python -m experiments.animation       # 3 minutes of one core
    python -m experiments.animation --quick                 # seconds

Takes two runs of experiments.qualitative, with communication and without, which are trained first
where they are not there. Then it shows what the two networks make of one test image. Nothing is painted by hand:
the maps are tensors of the network. Of the K channels of a map, the one that is most like the true
mask is shown. Writes runs/animation/animation.gif; that in experiments/ is a copy.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor, nn

from decompose import DecomposedUNet, Tiling
from experiments.common import SILENT, TALKING, make_folder, run_folder
from experiments.qualitative import train_model
from support.datasets import build_datasets
from support.model import load_model
from support.options import Parser
from support.sizes import build_tiling

IMAGE = 3  # of the test images: a piece of its line lies in a tile that holds no disc
STEPS = {  # name: where it stands in the line of steps at the top, in pixels
    "cut": 54,
    "encode": 146,
    "stitch": 244,
    "communicate": 366,
    "give back": 512,
    "decode": 638,
}
ARROWS = (90, 198, 284, 450, 580)  # between them
GPU_COLORS = ("#7b4fa3", "#2a8c55", "#c23b5a", "#2f7fb8")

# The stage, in pixels from its upper left corner
WIDTH, HEIGHT = 720, 440
TILE = 128  # side of a tile
GPUS, COMM_NET = 186, 534  # where the middle of the GPUs is, and that of the communication network
MIDDLE = 236
GAP = 14  # between tiles that are apart
MOVE = (0.06, 0.25, 0.5, 0.75, 0.94, 1.0)  # how much of its way something has gone, frame by frame
COLORS = 256  # in all frames the same, so that what does not change takes no room in the file


# What is shown

@torch.no_grad()
def look_inside(model: DecomposedUNet, image: Tensor, mask: Tensor, tiling: Tiling) -> tuple[list[Tensor], Tensor]:
    """An image (C,H,W) and its true mask (H,W) -> coarse maps (H/2^D,W/2^D), and the mask (H,W) that the model draws.

    The coarse maps are the input of the communication network, and then what each of its layers
    makes of it. There are none if the model does not communicate.
    """
    figures = (mask > 0).float()[None]  # discs and line
    coarse_figures = nn.functional.adaptive_avg_pool2d(figures, tiling.coarse.size).flatten()
    maps = []

    def keep(channels):
        likeness = nn.functional.cosine_similarity(channels.flatten(1), coarse_figures, dim=1)
        best = likeness.argmax()
        maps.append(channels[best].clone())  # a copy, as the next layer may change it in place

    def keep_input(layer, inputs):
        keep(inputs[0][0])

    def keep_output(layer, inputs, output):
        keep(output[0])

    hooks = []
    if model.comm_net is not None:
        hooks.append(model.comm_net.register_forward_pre_hook(keep_input))
        for layer in model.comm_net:
            if isinstance(layer, nn.ReLU):
                hooks.append(layer.register_forward_hook(keep_output))
    logits = tiling.stitch(model(tiling.split(image[None]), tiling))
    for hook in hooks:
        hook.remove()
    return maps, logits[0].argmax(dim=0)


def paint(values: Tensor, colormap: str) -> list[np.ndarray]:
    """A map (h,w) of numbers from 0 on -> its tiles in colour. The largest number is the brightest."""
    numbers = values.numpy()
    largest = max(numbers.max(), 1e-6)
    return cut(colormaps[colormap](numbers / largest)[..., :3])


def paint_mask(mask: Tensor, colors: list) -> list[np.ndarray]:
    return cut(np.array(colors)[mask.numpy()])


def cut(picture: np.ndarray) -> list[np.ndarray]:
    """Colours (h,w,3) -> those of its four tiles, each enlarged to TILE x TILE."""
    half = len(picture) // 2
    zoom = TILE // half
    tiles = []
    for top in (0, half):
        for left in (0, half):
            tile = picture[top:top + half, left:left + half]
            tiles.append(tile.repeat(zoom, axis=0).repeat(zoom, axis=1))
    return tiles


# Where it is shown

def corners(centre: float, gap: float) -> list[np.ndarray]:
    """(x, y) of the upper left corner of each of the four tiles around a centre, when they are `gap` pixels apart."""
    left = centre - TILE - gap / 2
    right = centre + gap / 2
    above = MIDDLE - TILE - gap / 2
    below = MIDDLE + gap / 2
    return [np.array(corner) for corner in ((left, above), (right, above), (left, below), (right, below))]


WHOLE = corners(GPUS, 0)
APART = corners(GPUS, GAP)
STITCHED = corners(COMM_NET, 0)


def between(start: list[np.ndarray], end: list[np.ndarray], part: float) -> list[np.ndarray]:
    """Places or colours on the way from `start` (part 0) to `end` (part 1)."""
    mixed = []
    for first, last in zip(start, end):
        mixed.append((1 - part) * first + part * last)
    return mixed


class Film:
    """Frames that are drawn one after the other: `begin` one, put tiles on it, `shoot` it."""

    def __init__(self):
        self.figure = plt.figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.frames = []
        self.milliseconds = []  # how long each of them stays

    def begin(self, step: str, caption: str):
        """An empty stage. step: one of STEPS, or "" before and after them."""
        self.axes.clear()
        self.axes.axis("off")
        for name, x in STEPS.items():
            if name == step:
                self.write(x, 28, name, size=13, weight="bold")
            else:
                self.write(x, 28, name, size=13, color="#a8a8a8")
        for x in ARROWS:
            self.write(x, 27, "\u203a", size=14, color="#a8a8a8")
        self.write(WIDTH / 2, HEIGHT - 32, caption, size=15)
        if step:
            self.titles("four GPUs", "communication network")
            corner = STITCHED[0]
            outline = plt.Rectangle(corner, 2 * TILE, 2 * TILE, fill=False, edgecolor="#a8a8a8", linestyle="--")
            self.axes.add_patch(outline)

    def write(self, x: float, y: float, text: str, **style):
        self.axes.text(x, y, text, ha="center", va="center", **style)

    def titles(self, left: str, right: str):
        self.write(GPUS, 76, left, size=13)
        self.write(COMM_NET, 76, right, size=13)

    def picture(self, tiles: list[np.ndarray], places: list[np.ndarray]):
        """Four tiles without frames."""
        for tile, (x, y) in zip(tiles, places):
            self.axes.imshow(tile, extent=(x, x + TILE, y + TILE, y), interpolation="nearest", zorder=3)
        self.axes.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0), aspect="auto")

    def on_gpus(self, tiles: list[np.ndarray], places: list[np.ndarray]):
        """Four tiles in frames, and the names of their GPUs."""
        self.framed(tiles, places)
        for i, (x, y) in enumerate(places):
            box = {"facecolor": GPU_COLORS[i], "edgecolor": "none", "pad": 3}
            self.axes.text(x + 5, y + 12, f"GPU {i}", va="center", size=10, color="white", bbox=box, zorder=3)

    def framed(self, tiles: list[np.ndarray], places: list[np.ndarray]):
        """Four tiles in frames of the colours of their GPUs."""
        self.picture(tiles, places)
        for color, corner in zip(GPU_COLORS, places):
            self.axes.add_patch(plt.Rectangle(corner, TILE, TILE, fill=False, edgecolor=color, linewidth=2.5, zorder=3))

    def shoot(self, milliseconds: int = 60):
        self.figure.canvas.draw()
        self.frames.append(np.asarray(self.figure.canvas.buffer_rgba())[..., :3].copy())
        self.milliseconds.append(milliseconds)

    def hold(self, milliseconds: int):
        """The last frame stays for longer."""
        self.milliseconds[-1] += milliseconds

    def save(self, path: Path):
        all_frames = Image.fromarray(np.concatenate(self.frames))
        palette = all_frames.quantize(COLORS, method=Image.Quantize.MAXCOVERAGE)
        images = []
        for frame in self.frames:
            images.append(Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE))
        images[0].save(path, save_all=True, append_images=images[1:], duration=self.milliseconds, loop=0)
        plt.close(self.figure)


# The story. Every picture in it is a list of four tiles.

def tell(film: Film, image: list, maps: list[list], decoded: list, mask: list, without: list):
    """maps: the coarse map as it was sent, and then what each layer of the communication network makes of it.
    decoded: the mask with communication; mask: the true one; without: the mask without communication."""
    sent = maps[0]
    received = maps[-1]

    film.begin("", "Find the line that joins the two discs.")
    film.titles("image", "wanted: its mask")
    film.picture(image, WHOLE)
    film.picture(mask, STITCHED)
    film.shoot(1000)

    for part in MOVE:
        film.begin("cut", "Each GPU gets one tile.")
        film.on_gpus(image, between(WHOLE, APART, part))
        film.shoot()
    film.hold(500)

    for part in MOVE:
        film.begin("encode", "Each GPU makes a small, coarse map of its tile.")
        film.on_gpus(between(image, sent, part), APART)
        film.shoot()
    film.hold(600)

    white = [np.ones_like(tile) for tile in image]
    waiting = between(image, white, 0.7)
    for part in MOVE:
        film.begin("stitch", "The small maps become one map of the whole image.")
        film.on_gpus(waiting, APART)
        film.framed(sent, between(APART, STITCHED, part))
        film.shoot()
    film.hold(400)

    for before, after in zip(maps, maps[1:]):
        for part in (0.5, 1.0):
            film.begin("communicate", "A small network sees all of it, and links the discs.")
            film.on_gpus(waiting, APART)
            film.framed(between(before, after, part), STITCHED)
            film.shoot(150)
    film.hold(400)

    for part in MOVE:
        film.begin("give back", "Each GPU gets its part back.")
        film.on_gpus(waiting, APART)
        film.framed(received, between(STITCHED, APART, part))
        film.shoot()
    film.hold(300)

    for part in MOVE:
        film.begin("decode", "Each GPU draws its part of the mask.")
        film.on_gpus(between(received, decoded, part), APART)
        film.shoot()
    film.hold(500)

    film.begin("", "Without communication, no tile knows where the line goes.")
    film.titles("with communication", "without communication")
    film.picture(decoded, WHOLE)
    film.picture(without, STITCHED)
    film.shoot(2000)


def draw(path: Path, with_communication: Path, without_communication: Path):
    """The film of two runs."""
    model, config = load_model(with_communication / "best.pt")
    other_model, _ = load_model(without_communication / "best.pt")
    dataset = build_datasets(config)["test"]
    image, mask = dataset[min(IMAGE, len(dataset) - 1)]  # a smoke run has fewer
    tiling = build_tiling(config, mask.shape)
    maps, decoded = look_inside(model, image, mask, tiling)
    _, without = look_inside(other_model, image, mask, tiling)

    colors = config["colors"]
    painted = [paint(maps[0], "viridis")]
    for coarse_map in maps[1:]:
        painted.append(paint(coarse_map, "magma"))
    film = Film()
    tell(film, paint(image[0], "gray"), painted, paint_mask(decoded, colors), paint_mask(mask, colors),
         paint_mask(without, colors))
    film.save(path)


def main(arguments: list[str] | None = None):
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    asked = parser.parse_args(arguments)
    folders = []
    for name in (TALKING, SILENT):
        train_model(name, [0], asked.quick)
        folders.append(run_folder(make_folder("qualitative", asked.quick), name, seed=0))
    path = make_folder("animation", asked.quick) / "animation.gif"
    draw(path, *folders)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
