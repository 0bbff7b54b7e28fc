"""The command line of train.py and plan.py, and what all commands share: one line for an error, progress."""

import argparse
import io
import math
import sys
from pathlib import Path

import torch

from support import processes

WITH_RESUME = ("--data", "--workers", "--image-processes")  # what may be given with --resume
LARGE = 2**20  # the most that an option may be: with more, PyTorch overflows


class DefaultsInHelp(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the default of each option, unless there is none or its help says it in words."""

    def _get_help_string(self, action):
        if action.default is None:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    def parse_args(self, arguments: list[str] | None = None) -> argparse.Namespace:
        """Reads the options. From here on, what the terminal cannot show is printed as \\x and a number."""
        if isinstance(sys.stdout, io.TextIOWrapper):  # in a notebook it is something else, which shows everything
            sys.stdout.reconfigure(errors="backslashreplace")
        return super().parse_args(arguments)

    def error(self, message: str):
        """One line and exit status 2, without the usage in front."""
        self.exit(2, f"{self.prog}: error: {message}\n")


# Types of options

def number(smallest, kind=int, largest=math.inf):
    """An argparse type: a finite number from `smallest` to `largest`, which is a whole one if `kind` is int."""
    wanted = "a whole number" if kind is int else "a number"
    if largest == math.inf:
        wanted += f" of at least {smallest}"
    else:
        wanted += f" from {smallest} to {largest}"

    def parse_number(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not smallest <= value <= largest or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value
    return parse_number


def pair(text: str) -> tuple[int, int]:
    """An argparse type: two numbers of 1 or more, as in 2x3."""
    first, _, second = text.partition("x")
    for side in (first, second):
        if not side.isdecimal() or not 1 <= int(side) <= LARGE:
            raise argparse.ArgumentTypeError(f"{text!r} is not two whole numbers from 1 to {LARGE}, as in 2x3")
    return int(first), int(second)


def size(text: str) -> tuple[int, int]:
    """An argparse type: one number for both sides, or two as in 64x96."""
    if text.isdecimal():
        text = f"{text}x{text}"
    return pair(text)


def class_weight(text: str) -> float | str:
    """An argparse type: "balanced", or a number of 0 or more."""
    if text == "balanced":
        return text
    try:
        return number(0, float)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor the word balanced") from None


# Defaults that depend on the machine

def has_bfloat16() -> bool:
    """Whether the GPUs, or without one the CPU, multiply bfloat16 in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def default_grid(gpus: int) -> tuple[int, int]:
    """2x2 for up to 4 GPUs. For more, a grid that is as square as can be with one or two tiles for each GPU."""
    if gpus <= 4:
        return 2, 2
    best = (1, gpus)
    for tiles in (gpus, 2 * gpus):
        for rows in range(1, math.isqrt(tiles) + 1):
            columns = tiles // rows
            if tiles % rows == 0 and columns / rows < best[1] / best[0]:
                best = (rows, columns)
    return best


# The options of train.py and plan.py

def make_parser(description: str) -> Parser:
    parser = Parser(description=description, formatter_class=DefaultsInHelp, allow_abbrev=False)
    option, unset = parser.add_argument, argparse.SUPPRESS
    option("--dataset", choices=["synthetic", "folder", "deepglobe"], default="synthetic", help="what to learn: lines "
           "between circles, images and masks of your own, or DeepGlobe's land cover")
    option("--data", type=Path, default=None, metavar="DIR", help="folder of the images and masks, as "
           "docs/own-images.md tells; with --resume, the folder in which they are now")
    option("--crop", type=size, default=None, metavar="N|HxW", help="learn from windows of this size, cut at another "
           "place each time (default: whole images)")
    option("--augment", action=argparse.BooleanOptionalAction, default=True, help="flip images from a folder at "
           "random, and turn square ones")
    option("--workers", type=number(0, largest=LARGE), default=None, metavar="N", help="processes that read images "
           "ahead, for each process that trains (default: for pictures one for each CPU core, at most 4; else 0)")
    option("--gpus", type=number(1, largest=LARGE), default=unset, help="GPUs to use (default: all there "
           "are); to use none, put CUDA_VISIBLE_DEVICES= in front of the command")
    option("--image-processes", type=number(1, largest=LARGE), default=1, metavar="N", help="how many of the processes "
           "that torchrun starts share the tiles of each image; with 1 they share out batches only")
    option("--grid", type=pair, default=unset, metavar="RxQ", help="rows x columns of tiles (default: 2x2 for up to 4 "
           "GPUs that share an image, else one or two tiles for each, as square as can be)")
    option("--overlap", type=number(0), default=0, metavar="PX", help="pixels that a tile sees beyond its borders, "
           "a multiple of 2^depth")
    option("--width", type=number(1, largest=4096), default=8, help="channels at full resolution; "
           "each level down doubles them")
    option("--depth", type=number(1, largest=12), default=3, help="how often the encoder halves the resolution")
    option("--comm-channels", type=number(0), default=32, metavar="K", help="channels of the coarse map that the tiles "
           "exchange; 0: they know nothing of each other")
    option("--dilations", type=number(1, largest=1024), nargs="+", default=[1, 1, 1], metavar="N", help="dilation of "
           "each convolution of the communication network; together they see 2 * sum * 2^depth pixels to every side")
    option("--dropout", type=number(0, float), default=0.0, help="probability with which a channel is left out")
    option("--image-size", type=size, default=unset, metavar="N|HxW", help="pixels of the synthetic images "
           "(default: 64)")
    option("--train-images", type=number(1, largest=2**31), default=unset, metavar="N", help="synthetic images to "
           "learn from; validation and test have an eighth each (default: 2400)")
    option("--epochs", type=number(0), default=4, help="passes over the training images; 0: only evaluate")
    option("--batch-size", type=number(1, largest=LARGE), default=16, help="images per step")
    option("--class-weights", type=class_weight, nargs="+", default=None, metavar="W", help="weight of each class in "
           "the loss: a number for each, or balanced, with which rare classes weigh more (default: all the same)")
    option("--lr", type=number(0, float), default=0.015, help="peak of the one-cycle learning rate")
    option("--freeze-batch-norm", type=number(0, float, 1), default=0.5, metavar="PART", help="after this part of the "
           "training steps, batch norm keeps its running statistics and uses them, as in evaluation; 1: never, as in "
           "the paper")
    option("--recompute", action="store_true", help="forget the activations of each tile and compute them again when "
           "they are needed, so that a GPU holds those of one tile at a time")
    option("--amp", action=argparse.BooleanOptionalAction, default=unset, help="compute in bfloat16, with weights, "
           "statistics and sums in float32 (default: where the hardware has it; plan.py: yes)")
    option("--seed", type=number(0, largest=2**63 - 1), default=0, help="seed of the images, the weights, "
           "dropout and the order")
    option("--out", type=Path, default=unset, help="folder of the run (default: a new one in runs/)")
    return parser


def parse(arguments: list[str] | None, parser: Parser, **defaults) -> dict:
    """The configuration: every option with its value, paths as text. Options that do not go
    together end the program with one line. A run that goes on (--resume) has the options of its
    folder. Then there are only "resume", and in "changes" the options that may be given with it."""
    config = {**defaults, **vars(parser.parse_args(arguments))}
    if config.get("resume"):
        changes = changes_of_run(options_given(arguments), config, parser)
        return {"resume": str(config["resume"]), "changes": changes}

    gpus = config.get("gpus", processes.gpus_each())
    config.setdefault("grid", default_grid(gpus * config["image_processes"]))
    config.setdefault("gpus", min(gpus, tiles_each(config)))
    config.setdefault("amp", has_bfloat16())
    check_network(config, parser)
    check_data(config, parser)
    check_class_weights(config, parser)
    choose_folder(config, parser)
    for name in ("data", "out", "resume", "init"):
        if config.get(name) is not None:
            config[name] = str(config[name])
    return config


def options_given(arguments: list[str] | None) -> list[str]:
    """The options on the command line, without their values: --data for example."""
    words = sys.argv[1:] if arguments is None else arguments
    given = []
    for word in words:
        if word.startswith("--"):
            option, _, _ = word.partition("=")
            given.append(option)
    return given


def tiles_each(config: dict) -> int:
    """The most tiles of an image that one process computes."""
    rows, columns = config["grid"]
    return math.ceil(rows * columns / config["image_processes"])


def changes_of_run(options: list[str], config: dict, parser: Parser) -> dict:
    """What is changed by the options that are given with --resume. config: every option with its value."""
    changes = {}
    for option in options:
        if option in WITH_RESUME:
            name = option.removeprefix("--").replace("-", "_")
            changes[name] = config[name]
        elif option != "--resume":
            parser.error("--resume goes on with the options of the run; give it alone, or with "
                         f"{', '.join(WITH_RESUME)}, but without {option}; to train longer or otherwise, begin a new "
                         "run with its weights: --init RUN/best.pt")
    return changes


def check_network(config: dict, parser: Parser):
    rows, columns = config["grid"]
    tiles = rows * columns
    if tiles > LARGE:
        parser.error(f"--grid {rows}x{columns}: take at most {LARGE} tiles")
    if config["image_processes"] > tiles:
        parser.error(f"--image-processes {config['image_processes']}, but --grid {rows}x{columns} has only {tiles} "
                     "tiles: take fewer processes or a finer grid")
    if config["gpus"] > tiles_each(config):
        parser.error(f"--gpus {config['gpus']}, but --grid {rows}x{columns} has only {tiles_each(config)} tiles for "
                     "each process: take fewer GPUs or a finer grid")
    coarse_channels = config["width"] * 2 ** config["depth"]
    if config["comm_channels"] > coarse_channels:
        parser.error(f"--comm-channels {config['comm_channels']}, but the coarse map of --width {config['width']} and "
                     f"--depth {config['depth']} has only {coarse_channels} channels: take at most that many")
    if config["dropout"] >= 1:
        parser.error(f"--dropout {config['dropout']}: take less than 1")


def check_data(config: dict, parser: Parser):
    synthetic = config["dataset"] == "synthetic"
    for option, value in (("image_size", (64, 64)), ("train_images", 2400)):
        if option in config and not synthetic:
            parser.error(f"--{option.replace('_', '-')} is for --dataset synthetic; a folder has its own")
        config.setdefault(option, value)
    if synthetic and config["data"]:
        parser.error(f"--data {config['data']}: say also what is in it, --dataset folder or --dataset deepglobe")
    if synthetic and config["crop"]:
        parser.error("--crop is for --dataset folder or deepglobe; for synthetic take --image-size")
    if synthetic:
        return
    if not config["data"]:
        parser.error(f"--dataset {config['dataset']}: say also where it is, --data DIR")
    config["data"] = config["data"].absolute()  # --resume may be called from elsewhere
    out = config.get("out", Path("runs"))
    if config["data"] in out.absolute().parents:
        parser.error(f"--out {out}: is inside --data, where it would be taken for images; name another --out")


def check_class_weights(config: dict, parser: Parser):
    """How many numbers there must be is known after a look at the images."""
    weights = config["class_weights"]
    if weights is None:
        return
    if weights == ["balanced"]:
        if config["dataset"] == "synthetic":
            parser.error("--class-weights balanced is for --dataset folder or deepglobe; for synthetic give numbers")
    elif "balanced" in weights or sum(weights) == 0:
        parser.error(f"--class-weights {' '.join(map(str, weights))}: give balanced alone, or a number for each class, "
                     "not all of them 0")


def choose_folder(config: dict, parser: Parser):
    """Sets "out" to None if it is not given: the run will make a folder of its own. Sets "resume"
    if torchrun restarts a run."""
    config.setdefault("out", None)
    if not processes.CAN_RESTART:
        return
    if processes.KEEPS_ADDRESSES:
        parser.error("torchrun --max-restarts: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in front of it, or a restart "
                     "may find stale addresses (PyTorch issue 135712)")
    if config["out"] is None:
        parser.error("torchrun --max-restarts: a run that is restarted needs to know its folder; give --out")
    if (config["out"] / "last.pt").exists():
        config["resume"] = config["out"]


# Errors, progress

def explain(error: OSError, path: Path) -> str:
    """One line for a file or folder that cannot be used; `path`, if the error names none."""
    return (f"{error.filename or path}: {error.strerror or error}; see that you may use it and that its disk has "
            "space, or name another")


def show_progress(text: str):
    """On a terminal, one line that is overwritten; elsewhere nothing."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)
