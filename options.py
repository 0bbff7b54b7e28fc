"""The command line of train.py, and one line for whoever asks what cannot be done."""

import argparse
import functools
import itertools
import math
import os
import sys
from pathlib import Path

import torch

import checkpoints
import processes
from decompose import Tiling
from image_folder import DataError

LARGE = 2**20  # the most that an option may be: with more, PyTorch overflows
SMALL = 256  # pixels; a CPU takes three times as long for an image in tiles of 32x32

class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line and exit status 2, without the usage in front."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(smallest, kind=int, largest=math.inf):
    """An argparse type: a finite number from `smallest` to `largest`."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not smallest <= value <= largest or value == math.inf:
            limit = "or more" if largest == math.inf else f"to {largest}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {smallest} {limit}")
        return value
    return parse


def pair(text: str) -> tuple[int, int]:
    """An argparse type: two numbers of 1 or more, as in 2x3."""
    first, _, second = text.partition("x")
    if not (first.isdecimal() and second.isdecimal() and 1 <= int(first) <= LARGE and 1 <= int(second) <= LARGE):
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers of 1 to {LARGE}, as in 2x3")
    return int(first), int(second)


def size(text: str) -> tuple[int, int]:
    """An argparse type: one number for both sides, or two as in 64x96."""
    return pair(f"{text}x{text}" if text.isdecimal() else text)


def has_bfloat16() -> bool:
    """Whether the GPUs, or without one the CPU, multiply bfloat16 in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def default_grid(gpus: int) -> tuple[int, int]:
    """2x2 for up to 4 GPUs; else one or two tiles for each, whichever can be laid out closer to a square."""
    if gpus <= 4:
        return 2, 2
    grids = [(rows, tiles // rows) for tiles in (gpus, 2 * gpus) for rows in range(1, math.isqrt(tiles) + 1)
             if tiles % rows == 0]
    return min(grids, key=lambda grid: grid[1] / grid[0])


def make_parser(description: str) -> Parser:
    parser = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    option, unset = parser.add_argument, argparse.SUPPRESS
    option("--dataset", choices=["synthetic", "folder", "deepglobe"], default="synthetic", help="what to learn: lines "
           "between circles, images and masks of your own, or DeepGlobe's land cover")
    option("--data", type=Path, default=None, metavar="DIR", help="folder of your own images or of DeepGlobe's; the top "
           "of image_folder.py tells the layout")
    option("--crop", type=size, default=None, metavar="N|HxW", help="learn from windows of this size, somewhere else each "
           "time (default: whole images)")
    option("--augment", action=argparse.BooleanOptionalAction, default=True, help="flip images from a folder at random, "
           "and turn square ones")
    option("--gpus", type=number(1, largest=LARGE), default=unset, help="GPUs to use (default: all there are)")
    option("--grid", type=pair, default=unset, metavar="RxQ", help="rows x columns of tiles (default: 2x2 for up to 4 "
           "GPUs, else one or two tiles for each, as square as can be)")
    option("--overlap", type=number(0), default=0, metavar="PX", help="pixels that a tile sees beyond its borders, "
           "a multiple of 2^depth")
    option("--width", type=number(1, largest=4096), default=8, help="channels at full resolution; "
           "each level down doubles them")
    option("--depth", type=number(1, largest=12), default=3, help="how often the encoder halves the resolution")
    option("--comm-channels", type=number(0), default=32, metavar="K", help="channels of the coarse map that the tiles "
           "exchange; 0: they know nothing of each other")
    option("--dilations", type=number(1, largest=1024), nargs="+", default=[1, 1, 1], metavar="N", help="dilation of "
           "each convolution of the communication network; together they see 2 * sum * 2^depth pixels to every side")
    option("--dropout", type=number(0, float), default=0.0, help="probability of a channel to be left out")
    option("--image-size", type=size, default=unset, metavar="N|HxW", help="pixels of the synthetic images (default: 64)")
    option("--train-images", type=number(1, largest=2**31), default=unset, metavar="N", help="synthetic images to learn "
           "from; validation and test have an eighth each (default: 2400)")
    option("--epochs", type=number(0), default=4, help="passes over the training images; 0: only evaluate")
    option("--batch-size", type=number(1, largest=LARGE), default=16, help="images per step")
    option("--lr", type=number(0, float), default=0.015, help="peak of the one-cycle learning rate")
    option("--freeze-batch-norm", type=number(0, float, 1), default=0.5, metavar="PART", help="part of the training steps "
           "after which batch norm keeps its running statistics and uses them, as it will in evaluation; 1: never, as in "
           "the paper")
    option("--recompute", action="store_true", help="forget every tile's activations and compute them again when they "
           "are needed: memory for one tile per GPU, whatever the image")
    option("--amp", action=argparse.BooleanOptionalAction, default=unset, help="compute in bfloat16, with weights, "
           "statistics and sums in float32 (default: where the hardware has it; plan.py: yes)")
    option("--seed", type=number(0, largest=2**63 - 1), default=0, help="of images, weights, dropout and order")
    option("--out", type=Path, default=unset, help="folder of the run (default: a new one in runs/)")
    return parser


def parse(arguments: list[str] | None, parser: Parser, **defaults) -> dict:
    """The configuration: every option with its value. Options that do not go together end here, with one line."""
    config = defaults | vars(parser.parse_args(arguments))
    if config.get("resume"):
        if any(word.startswith("-") and not word.startswith("--resume") for word in arguments or sys.argv[1:]):
            parser.error("--resume goes on with the options of the run; give it alone")
        return {"resume": config["resume"]}

    rows, columns = config.setdefault("grid", default_grid(config.get("gpus", processes.gpus_each())))
    gpus = config.setdefault("gpus", min(processes.gpus_each(), rows * columns))
    config.setdefault("amp", has_bfloat16())
    k, coarse_channels = config["comm_channels"], config["width"] * 2 ** config["depth"]
    if rows * columns > LARGE:
        parser.error(f"--grid {rows}x{columns}: take at most {LARGE} tiles")
    if gpus > rows * columns:
        parser.error(f"--gpus {gpus}, but --grid {rows}x{columns} has only {rows * columns} tiles: take fewer GPUs or "
                     "a finer grid")
    if k > coarse_channels:
        parser.error(f"--comm-channels {k}, but the coarse map of --width {config['width']} and --depth "
                     f"{config['depth']} has only {coarse_channels} channels: take at most that many")
    if config["dropout"] >= 1:
        parser.error(f"--dropout {config['dropout']}: take less than 1")
    for option, value in (("image_size", (64, 64)), ("train_images", 2400)):
        if option in config and config["dataset"] != "synthetic":
            parser.error(f"--{option.replace('_', '-')} is for --dataset synthetic; a folder has its own")
        config.setdefault(option, value)
    if config["dataset"] == "synthetic" and config["data"]:
        parser.error(f"--data {config['data']}: say also what is in it, --dataset folder or --dataset deepglobe")
    if config["dataset"] != "synthetic" and not config["data"]:
        parser.error(f"--dataset {config['dataset']}: say also where it is, --data DIR")
    if config["data"]:
        config["data"] = config["data"].absolute()  # --resume may be called from elsewhere
        if config["data"] in config.get("out", Path("runs")).absolute().parents:
            parser.error(f"--out {config['out']}: is inside --data, where it would be taken for images; name another --out")
    if config["crop"] and config["dataset"] == "synthetic":
        parser.error("--crop is for --dataset folder or deepglobe; for synthetic take --image-size")
    if processes.CAN_RESTART and processes.REMEMBERS:
        parser.error("torchrun --max-restarts: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in front of it, or a restart may "
                     "find stale addresses (PyTorch issue 135712)")
    if "out" not in config:
        if processes.CAN_RESTART:
            parser.error("torchrun --max-restarts: a run that is restarted needs to know its folder; give --out")
        config["out"] = new_folder(f"runs/{config['dataset']}-{rows}x{columns}-k{k}-seed{config['seed']}")
    elif processes.CAN_RESTART and (config["out"] / "last.pt").exists():
        config["resume"] = config["out"]
    elif config["out"].is_dir() and not all(map(checkpoints.is_unfinished, config["out"].iterdir())):
        parser.error(f"--out {config['out']}: this folder is not empty; name a new one, or go on with the run in it: "
                     f"--resume {config['out']}")
    return {name: str(value) if isinstance(value, Path) else value for name, value in config.items()}


def check_sizes(config: dict, sizes: dict[tuple[int, int], str], images: int) -> tuple[int, int]:
    """The size that --grid cuts: that of the crops, or the largest of the training images. DataError: it cannot be cut.
    sizes: those of the training images, with the name of one of each; images: how many there are."""
    if config["crop"]:
        sizes = {config["crop"]: "--crop"}
    size, batch = max(sizes, key=math.prod), config["batch_size"]
    if len(sizes) > 1 and batch > 1:
        (one, another), *_ = itertools.combinations(sizes.items(), 2)
        raise DataError(f"{another[1]}: {another[0][0]}x{another[0][1]} pixels, but {one[1]} has {one[0][0]}x{one[0][1]}; "
                        "images of several sizes need --batch-size 1 or --crop HxW")
    try:
        tilings = [build_tiling(config | {"image_size": size}, other) for other in sizes]
    except ValueError as error:
        rows, columns = config["grid"]
        raise DataError(f"{sizes[size]}: --grid {rows}x{columns} --overlap {config['overlap']} --depth {config['depth']}: "
                        f"{error}; take another --grid, --depth or --overlap") from None
    last_batch = images % batch or min(images, batch)
    smallest = min(max(number // processes.count(), 1) for number in (min(images, batch), last_batch))
    if smallest == 1 and any((1, 1) == (bottom - top, right - left)
                               for tiling in tilings for top, bottom, left, right in tiling.coarse.halos):
        raise DataError("a tile is a single cell, and a process has a batch of a single image: batch norm needs at least "
                        "two numbers; take another --batch-size, a coarser --grid or a smaller --depth")
    return size


@functools.cache
def cut(size: tuple[int, int], grid: tuple[int, int], cell: int, overlap: int) -> Tiling:
    return Tiling(size, grid, cell, overlap)


def build_tiling(config: dict, size: tuple[int, int], grid: tuple[int, int] | None = None) -> Tiling:
    """How an image of this size is cut: as `grid` says, if it is given; the size to learn from as --grid says; any other
    size into tiles no larger than those (a larger image: or than 256x256, if those are small). ValueError: it cannot be."""
    cell, overlap = 2 ** config["depth"], config["overlap"]
    if grid is None:
        grid = config["grid"]
        if tuple(size) != tuple(config["image_size"]):
            top, bottom, left, right = cut(tuple(config["image_size"]), tuple(grid), cell, 0).boxes[0]
            least = SMALL if math.prod(size) > math.prod(config["image_size"]) else 0
            grid = [-(-pixels // max(tile, least)) for pixels, tile in zip(size, (bottom - top, right - left))]
    return cut(tuple(size), tuple(grid), cell, overlap)


def explain(error: OSError, path: Path) -> str:
    """One line for a file or folder that cannot be used; `path`, if the error names none."""
    return (f"{error.filename or path}: {error.strerror or error}; it must be open to you and its disk have space, or name "
            "another")


def check_folder(path: Path):
    """DataError: no files can be written there, even if it were made."""
    there = next(folder for folder in [path, *path.absolute().parents] if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise DataError(f"--out {path}: cannot be written, as {there} is a file or closed to you; name another --out")


def new_folder(name: str) -> Path:
    """`name`, or if that exists already, `name-2`, `name-3`, ..."""
    return next(path for i in itertools.count(1) if not (path := Path(name if i == 1 else f"{name}-{i}")).exists())


def show_progress(text: str):
    """On a terminal, one line that is overwritten; elsewhere nothing."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)
