"""The command line: the options of train.py and plan.py, how far a program is, and one line for an error.

A program imports this file before PyTorch, whose loading takes seconds: --help need not wait for it.
"""

import argparse
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

# PyTorch reads this when it is loaded. Threads of GNU OpenMP that have nothing to do spin for a while before they
# sleep. If that takes long, on a machine with other work they keep the cores busy on which others would have something
# to do. (Not to spin at all, OMP_WAIT_POLICY=passive, made a quiet machine slower by a third.)
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Matplotlib, which draws into files here, refuses to be loaded if this names a backend that is not installed, as in a
# program that a notebook starts. In the notebook itself it is installed.
if "ipykernel" not in sys.modules:
    os.environ.pop("MPLBACKEND", None)


class UserError(ValueError):
    """Something that the user can mend. The message is one line that names the value, the limit and the fix."""


# What is printed

def show_progress(text: str):
    """On a terminal, one line that is overwritten; elsewhere nothing."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)


class Progress:
    """Shows how far a long piece of work is, and how long the rest will take.

        progress = Progress("step", total=600)
        for step in range(1, 601):
            ...
            progress.show(step, loss)  # step 120 of 600, loss 0.4321, 0:03:20 left

    On a terminal this is one line that is overwritten. In a file or a pipe it is a line every half a minute.

    what: the name of a part of the work; total: how many parts there are; done: how many of them were done before.
    """

    def __init__(self, what: str, total: int, done: int = 0):
        self.what = what
        self.total = total
        self.before = done
        self.started = time.perf_counter()
        self.shown = self.started

    def show(self, done: int, loss=None):
        """done: parts, of all; loss: a number or a tensor, which is only read when it is shown, as that waits for
        the GPU."""
        terminal = sys.stdout.isatty()
        now = time.perf_counter()
        if now - self.shown < (0.2 if terminal else 30):
            return
        self.shown = now
        left = (self.total - done) * (now - self.started) / (done - self.before)
        text = f"{self.what} {done} of {self.total}, "
        if loss is not None:
            text += f"loss {loss:.4f}, "
        text += f"{timedelta(seconds=round(left))} left"
        if terminal:
            show_progress(text)
        else:
            print(text, flush=True)


# The parser

class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line and exit status 2, without the usage in front."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(smallest, kind=int, largest=2**31):
    """An argparse type: a number from `smallest` to `largest`, which is a whole one if `kind` is int."""
    def number(text: str):
        value = kind(text)
        if not smallest <= value <= largest:  # which is also true of nan
            raise argparse.ArgumentTypeError(f"{text} is not from {smallest} to {largest}")
        return value
    return number  # argparse names it where `kind` fails: invalid number value


positive = number(1)
natural = number(0)


def pair(text: str) -> tuple[int, int]:
    """An argparse type: two numbers of 1 or more, as in 2x3. A single one stands for both."""
    rows, _, columns = text.partition("x")
    return positive(rows), positive(columns or rows)


def class_weight(text: str) -> float | str:
    """An argparse type: "balanced", or a number of 0 or more."""
    if text == "balanced":
        return text
    return number(0, float)(text)


def add_options(parser: Parser, amp: bool | None = None):
    """The options that train.py and plan.py have in common. amp: the default of --amp."""
    option = parser.add_argument_group("what most runs need").add_argument
    option("--dataset", choices=["synthetic", "folder"], default="synthetic", help="what to learn: lines between "
           "circles, or images and masks of your own (default: %(default)s)")
    option("--data", type=os.path.abspath, help="folder of the images and masks, as docs/own-images.md tells; "
           "with --resume, the folder in which they are now")
    option("--gpus", type=positive, help="GPUs to use (default: all there are); to use none, put "
           "CUDA_VISIBLE_DEVICES= in front of the command")
    option("--epochs", type=natural, default=4, help="passes over the training images; 0: only evaluate (default: "
           "%(default)s)")
    option("--out", help="folder of the run (default: a new one in runs/)")

    option = parser.add_argument_group("data").add_argument
    option("--crop", type=pair, metavar="N|HxW", help="learn from windows of this size, cut at another place each "
           "time (default: whole images)")
    option("--augment", action=argparse.BooleanOptionalAction, default=True, help="flip images from a folder at "
           "random, and turn square ones (default: yes)")
    option("--image-size", type=pair, default="64", metavar="N|HxW", help="pixels of the synthetic images (default: "
           "%(default)s)")
    option("--train-images", type=positive, default=2400, help="synthetic images to learn from; validation and test "
           "have an eighth each (default: %(default)s)")

    option = parser.add_argument_group("network").add_argument
    option("--grid", type=pair, metavar="RxQ", help="rows x columns of tiles (default: 2x2 for up to 4 GPUs that share "
           "an image, else a tile for each, in a grid as square as can be)")
    option("--overlap", type=natural, default=0, metavar="PX", help="pixels that a tile sees beyond its borders, a "
           "multiple of 2^depth (default: %(default)s)")
    option("--width", type=number(1, largest=4096), default=8, help="channels at full resolution; each level down "
           "doubles them (default: %(default)s)")
    option("--depth", type=number(1, largest=12), default=3, help="how often the encoder halves the resolution "
           "(default: %(default)s)")
    option("--comm-channels", type=natural, default=32, help="channels of the coarse map that the tiles exchange; "
           "0: they know nothing of each other (default: %(default)s)")
    option("--dilations", type=positive, nargs="+", default=[1, 1, 1], metavar="N", help="dilation of each convolution "
           "of the communication network; together they see 2 * sum * 2^depth pixels to every side (default: 1 1 1)")
    option("--dropout", type=number(0, float, 0.99), default=0.0, help="probability with which a channel is left out "
           "(default: %(default)s)")

    option = parser.add_argument_group("training").add_argument
    option("--batch-size", type=positive, default=16, help="images per step (default: %(default)s)")
    option("--lr", type=number(0, float), help="peak of the one-cycle learning rate (default: 0.015, and with a "
           "--batch-size under 16, less in proportion)")
    option("--class-weights", type=class_weight, nargs="+", metavar="W", help="weight of each class in the loss: a "
           "number for each, or balanced, with which rare classes weigh more (default: all the same)")
    option("--freeze-batch-norm", type=number(0, float, 1), help="after this part of the training steps, batch norm "
           "keeps its running statistics and uses them, as in evaluation; 1: never, as in the paper (default: 0.3, but "
           "not before 300 steps, or half of them if there are fewer than 600)")
    option("--seed", type=number(0, largest=2**63 - 1), default=0, help="seed of the images, the weights, dropout and "
           "the order (default: %(default)s)")

    option = parser.add_argument_group("devices").add_argument
    option("--recompute", action="store_true", help="forget the activations of each tile and compute them again when "
           "they are needed, so that a GPU holds those of one tile at a time (default: no)")
    option("--amp", action=argparse.BooleanOptionalAction, default=amp, help="compute in bfloat16, with weights, "
           "statistics and sums in float32 (default: where the hardware has it; plan.py: yes)")
    option("--workers", type=natural, help="processes that read images ahead, for each process that trains (default: "
           "for a folder one for each CPU core, at most 4; else 0)")
    option("--image-processes", type=positive, default=1, help="how many of the processes that torchrun starts share "
           "the tiles of each image; with 1 they share out batches only (default: %(default)s)")


def plan_parser() -> Parser:
    """The options of plan.py."""
    parser = Parser(usage="%(prog)s [OPTIONS]", description="Predict the peak memory of each GPU in a training step of "
                    "train.py, without a GPU.")
    option = parser.add_argument_group("what to predict").add_argument
    option("--memory", type=number(2, float), metavar="GIB", help="memory of a GPU, to be told also what would fit "
           "into it")
    option("--run", help="folder of a run of train.py, whose options are taken where they are not given here")
    option("--channels", type=positive, default=1, help="channels of the image (default: %(default)s)")
    option("--classes", type=number(2, largest=255), default=3, help="classes of the mask (default: %(default)s)")
    add_options(parser, amp=True)  # as all recent GPUs have it
    return parser


def train_parser() -> Parser:
    """The options of train.py."""
    parser = Parser(usage="%(prog)s [OPTIONS]", description="Train a domain-decomposed U-Net. Without a GPU, every "
                    "tile is computed on the CPU.")
    add_options(parser)
    option = parser.add_argument_group("other runs").add_argument
    option("--resume", help="folder of a run to go on with after its last completed epoch, with its "
           "options; only --data, --gpus, --workers and --image-processes go with it")
    option("--init", help="best.pt of another run, or its folder, to begin with its "
           "weights (default: weights drawn by the seed)")
    return parser


# What the options are, and whether they go together

def parse(arguments: list[str] | None, parser: Parser) -> dict:
    """The configuration: every option with its value. Options that do not go together end the program with one line.

    Of a run that goes on (--resume), only the options that are given with it.
    """
    config = vars(parser.parse_args(arguments))
    if config.get("resume"):
        return options_beside("resume", ("data", "gpus", "workers", "image_processes"), arguments, parser)

    from support import processes  # not at the top, as it loads PyTorch
    gpus = config["gpus"] or processes.gpus_each()
    config["grid"] = config["grid"] or default_grid(gpus * config["image_processes"])
    config["gpus"] = min(gpus, tiles_each(config))
    if config["amp"] is None:
        config["amp"] = has_bfloat16()
    check(config, parser)
    return config


def options_beside(name: str, allowed: Sequence[str], arguments: list[str] | None, parser: Parser) -> dict:
    """The options on the command line alone, with their values, where --resume or --run (`name`) stands for all others.

    Options that are not `allowed` beside it end the program with one line.
    """
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # an option that is not given has no value
    given = vars(parser.parse_args(arguments))
    if given.keys() - {name, *allowed}:
        options = ", --".join(allowed).replace("_", "-")
        parser.error(f"--{name} takes the options of the run; beside it can only stand --{options}")
    return given


def has_bfloat16() -> bool:
    """Whether the GPUs, or without one the CPU, multiply bfloat16 in hardware."""
    import torch  # not at the top, as above
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def default_grid(gpus: int) -> tuple[int, int]:
    """2x2 for up to 4 GPUs. For more, a tile for each GPU, in a grid that is as square as can be."""
    if gpus <= 4:
        return 2, 2
    rows = math.isqrt(gpus)
    while gpus % rows != 0:
        rows -= 1
    return rows, gpus // rows


def tiles_each(config: dict) -> int:
    """The most tiles of an image that one process computes."""
    return math.ceil(math.prod(config["grid"]) / config["image_processes"])


def check(config: dict, parser: Parser):
    coarse_channels = config["width"] * 2 ** config["depth"]
    if config["comm_channels"] > coarse_channels:
        parser.error(f"--comm-channels: the coarse map of this --width and --depth has only {coarse_channels} "
                     "channels; take at most that many")
    out, data = config["out"], config["data"]
    if out and data and Path(out).resolve().is_relative_to(Path(data).resolve()):
        parser.error(f"--out {out}: is inside --data, where its pictures would be taken for images")
    if (config["dataset"] == "folder") != bool(config["data"]):
        parser.error("--dataset folder and --data DIR go together; give both, or none of them")
    if not config["data"] and (config["crop"] or config["class_weights"] == ["balanced"]):
        parser.error("--crop and --class-weights balanced are for --dataset folder, and not for synthetic images")


# Errors in one line

@contextmanager
def one_line_errors(parser: Parser, out: Path | None = None):
    """Inside, what a user can mend ends the program with one line that tells how, and exit status 2.

    out: the folder of the run, once it is known. A name that the terminal cannot show is no error: of what it lacks,
    \\x and a number are printed.
    """
    if sys.stdout is None:  # the program was started without it
        sys.stdout = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):  # it has not if a program keeps what is printed
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except KeyboardInterrupt:
        said = "stopped"
        if out is not None and (out / "last.pt").exists():
            said += f"; go on with: python train.py --resume {shlex.quote(str(out))}"
        parser.exit(130, f"\n{said}\n")
    except UserError as error:
        parser.error(str(error).rpartition("DataError: ")[2].strip())  # of a worker, it ends a traceback
    except OSError as error:
        parser.error(str(error))
    except (RuntimeError, MemoryError) as error:
        if re.search("out of memory|allocate|DataLoader worker|MemoryError", repr(error)) is None:
            raise
        parser.error(f"{str(error) or repr(error)}; take fewer --workers, or ask plan.py what would fit, as docs/what-fits.md tells")
