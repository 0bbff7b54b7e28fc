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
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

# PyTorch reads this when it is loaded. Threads of GNU OpenMP that have nothing to do spin for a while before they sleep. If
# that takes long, on a machine with other work they keep the cores busy on which others would have something to do. (Not
# to spin at all, OMP_WAIT_POLICY=passive, made a quiet machine slower by a third.)
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Matplotlib, which draws into files here, refuses to be loaded if this names a backend that is not installed, as in a
# program that a notebook starts. In the notebook itself it is installed.
if "ipykernel" not in sys.modules:
    os.environ.pop("MPLBACKEND", None)

WITH_RESUME = ("--data", "--workers", "--image-processes")  # what may be given with --resume
UNSET = argparse.SUPPRESS  # an option that is not given has no entry yet; `parse` finds its default


class UserError(ValueError):
    """Something that the user can mend. The message is one line that names the value, the limit and the fix."""


class Diverged(ArithmeticError):
    """The loss is nan or infinite."""


# What is printed

class Escaped:
    """An output in which control characters become question marks. Otherwise the name of a file
    could clear the screen, or forge a line. What it cannot encode is shown as \\x and a number."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str):
        text = re.sub("[\x00-\x09\x0b-\x1f\x7f-\x9f]", "?", text)
        encoding = self.stream.encoding or "utf-8"
        self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def escaped(stream) -> Escaped:
    if stream is None:  # the program was started without this output
        stream = open(os.devnull, "w")
    if not isinstance(stream, Escaped):
        stream = Escaped(stream)
    return stream


def show_progress(text: str):
    """On a terminal, one line that is overwritten; elsewhere nothing."""
    if sys.stdout.isatty():
        stream = getattr(sys.stdout, "stream", sys.stdout)  # not Escaped, as this moves the cursor
        print(f"\r\033[K{text}", end="", file=stream, flush=True)


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
            text += f"loss {float(loss):.4f}, "
        text += f"{timedelta(seconds=round(left))} left"
        if terminal:
            show_progress(text)
        else:
            print(text, flush=True)


# The parser

class DefaultsInHelp(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the default of each option, unless there is none or its help says it in words."""

    def _get_help_string(self, action):
        if action.default is None:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    def parse_args(self, arguments: list[str] | None = None) -> argparse.Namespace:
        """Reads the options. From here on, what is printed is escaped."""
        sys.stdout = escaped(sys.stdout)
        sys.stderr = escaped(sys.stderr)
        return super().parse_args(arguments)

    def error(self, message: str):
        """One line and exit status 2, without the usage in front."""
        message = message.replace("\n", "?")
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(smallest, kind=int, largest=2**31):
    """An argparse type: a number from `smallest` to `largest`, which is a whole one if `kind` is int."""
    def number(text: str):
        value = kind(text)
        if not smallest <= value <= largest:  # which is also true of nan
            raise argparse.ArgumentTypeError(f"{text} is not from {smallest} to {largest}")
        return value
    return number  # argparse names it where `kind` fails: invalid number value


def pair(text: str) -> tuple[int, int]:
    """An argparse type: two numbers of 1 or more, as in 2x3. A single one stands for both."""
    found = re.fullmatch("([1-9][0-9]{0,6})(x([1-9][0-9]{0,6}))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not two whole numbers of at least 1, as in 2x3")
    return int(found[1]), int(found[3] or found[1])


def class_weight(text: str) -> float | str:
    """An argparse type: "balanced", or a number of 0 or more."""
    if text == "balanced":
        return text
    return number(0, float)(text)


def new_parser(description: str) -> Parser:
    return Parser(description=description, usage="%(prog)s [OPTIONS]", formatter_class=DefaultsInHelp,
                  allow_abbrev=False)


def add_options(parser: Parser):
    """The options that train.py and plan.py have in common."""
    yes_or_no = argparse.BooleanOptionalAction
    option = parser.add_argument_group("what most runs need").add_argument
    option("--dataset", choices=["synthetic", "folder"], default="synthetic", help="what to learn: lines between "
           "circles, or images and masks of your own")
    option("--data", type=os.path.abspath, metavar="DIR", help="folder of the images and masks, as docs/own-images.md tells; "
           "with --resume, the folder in which they are now")
    option("--gpus", type=number(1), default=UNSET, help="GPUs to use (default: all there are); to use none, put "
           "CUDA_VISIBLE_DEVICES= in front of the command")
    option("--epochs", type=number(0), default=4, help="passes over the training images; 0: only evaluate")
    option("--out", help="folder of the run (default: a new one in runs/)")

    option = parser.add_argument_group("data").add_argument
    option("--crop", type=pair, metavar="N|HxW", help="learn from windows of this size, cut at another place each "
           "time (default: whole images)")
    option("--augment", action=yes_or_no, default=True, help="flip images from a folder at random, and turn square "
           "ones")
    option("--image-size", type=pair, default="64", metavar="N|HxW", help="pixels of the synthetic images")
    option("--train-images", type=number(1), default=2400, metavar="N", help="synthetic images to learn from; "
           "validation and test have an eighth each")

    option = parser.add_argument_group("network").add_argument
    option("--grid", type=pair, default=UNSET, metavar="RxQ", help="rows x columns of tiles (default: 2x2 for up to 4 "
           "GPUs that share an image, else a tile for each, as square as can be)")
    option("--overlap", type=number(0), default=0, metavar="PX", help="pixels that a tile sees beyond its borders, "
           "a multiple of 2^depth")
    option("--width", type=number(1, largest=4096), default=8, help="channels at full resolution; each level down "
           "doubles them")
    option("--depth", type=number(1, largest=12), default=3, help="how often the encoder halves the resolution")
    option("--comm-channels", type=number(0), default=32, metavar="K", help="channels of the coarse map that the tiles "
           "exchange; 0: they know nothing of each other")
    option("--dilations", type=number(1), nargs="+", default=[1, 1, 1], metavar="N", help="dilation of each "
           "convolution of the communication network; together they see 2 * sum * 2^depth pixels to every side")
    option("--dropout", type=number(0, float, 0.99), default=0.0, help="probability with which a channel is left out")

    option = parser.add_argument_group("training").add_argument
    option("--batch-size", type=number(1), default=16, help="images per step")
    option("--lr", type=number(0, float), help="peak of the one-cycle learning rate (default: 0.015, and with a "
           "--batch-size under 16, less in proportion)")
    option("--class-weights", type=class_weight, nargs="+", metavar="W", help="weight of each class in the loss: a "
           "number for each, or balanced, with which rare classes weigh more (default: all the same)")
    option("--freeze-batch-norm", type=number(0, float, 1), metavar="PART", help="after this part of the training "
           "steps, batch norm keeps its running statistics and uses them, as in evaluation; 1: never, as in the paper "
           "(default: 0.3, but not before 300 steps, or half of them if there are fewer than 600)")
    option("--seed", type=number(0, largest=2**63 - 1), default=0, help="seed of the images, the weights, dropout and "
           "the order")

    option = parser.add_argument_group("devices").add_argument
    option("--recompute", action="store_true", help="forget the activations of each tile and compute them again when "
           "they are needed, so that a GPU holds those of one tile at a time")
    option("--amp", action=yes_or_no, default=UNSET, help="compute in bfloat16, with weights, statistics and sums in "
           "float32 (default: where the hardware has it; plan.py: yes)")
    option("--workers", type=number(0), metavar="N", help="processes that read images ahead, for each process that "
           "trains (default: for a folder one for each CPU core, at most 4; else 0)")
    option("--image-processes", type=number(1), default=1, metavar="N", help="how many of the processes that torchrun "
           "starts share the tiles of each image; with 1 they share out batches only")


def plan_parser() -> Parser:
    """The options of plan.py."""
    parser = new_parser("Predict the peak memory of each GPU in a training step of train.py, without a GPU.")
    option = parser.add_argument_group("what to predict").add_argument
    option("--memory", type=number(2, float), metavar="GIB", help="memory of a GPU, to be told also what would fit "
           "into it")
    option("--run", metavar="RUN", help="folder of a run of train.py, whose options are taken where they are not given "
           "here")
    option("--channels", type=number(1), default=1, help="channels of the image")
    option("--classes", type=number(2, largest=255), default=3, help="classes of the mask")
    add_options(parser)
    return parser


def train_parser() -> Parser:
    """The options of train.py."""
    parser = new_parser("Train a domain-decomposed U-Net. Without a GPU, every tile is computed on the CPU.")
    add_options(parser)
    option = parser.add_argument_group("other runs").add_argument
    option("--resume", metavar="RUN", help="folder of a run to go on with after its last completed epoch, "
           f"with its options; only {', '.join(WITH_RESUME)} go with it")
    option("--init", metavar="CHECKPOINT", help="best.pt of another run, or its folder, to begin with its "
           "weights (default: weights drawn by the seed)")
    return parser


# What the options are, and whether they go together

def parse(arguments: list[str] | None, parser: Parser, **defaults) -> dict:
    """The configuration: every option with its value. Options that do not go
    together end the program with one line. A run that goes on (--resume) has the options of its
    folder. Then there are only "resume", and in "changes" the options that may be given with it."""
    config = {**defaults, **vars(parser.parse_args(arguments))}
    if config.get("resume"):
        changes = changes_of_run(options_given(arguments), config, parser)
        return {"resume": config["resume"], "changes": changes}

    from support import processes  # not at the top, as it loads PyTorch
    gpus = config.get("gpus", processes.gpus_each())
    config.setdefault("grid", default_grid(gpus * config["image_processes"]))
    config["gpus"] = min(gpus, tiles_each(config))
    config.setdefault("amp", has_bfloat16())
    check(config, parser)
    return config


def options_given(arguments: list[str] | None) -> list[str]:
    """The options on the command line, without their values: --data for example."""
    words = sys.argv[1:] if arguments is None else arguments
    return [word.split("=")[0] for word in words if word.startswith("--")]


def changes_of_run(given: list[str], config: dict, parser: Parser) -> dict:
    """What is changed by the options that are given with --resume. config: every option with its value."""
    changes = {}
    for option in given:
        if option in WITH_RESUME:
            name = option.removeprefix("--").replace("-", "_")
            changes[name] = config[name]
        elif option != "--resume":
            parser.error("--resume goes on with the options of the run; give it alone, or with "
                         f"{', '.join(WITH_RESUME)}, but without {option}; to train longer or otherwise, begin a new "
                         "run with its weights: --init RUN/best.pt")
    return changes


def has_bfloat16() -> bool:
    """Whether the GPUs, or without one the CPU, multiply bfloat16 in hardware."""
    import torch  # not at the top, as above
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


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
    rows, columns = config["grid"]
    return math.ceil(rows * columns / config["image_processes"])


def check(config: dict, parser: Parser):
    coarse_channels = config["width"] * 2 ** config["depth"]
    if config["comm_channels"] > coarse_channels:
        parser.error(f"--comm-channels {config['comm_channels']}: the coarse map of this --width and --depth has only "
                     f"{coarse_channels} channels; take at most that many")
    weights = config["class_weights"]
    if weights and "balanced" in weights and len(weights) > 1:
        parser.error("--class-weights: give balanced alone, or a number for each class")
    if config["dataset"] == "synthetic":
        if config["data"] or config["crop"] or weights == ["balanced"]:
            parser.error("--data, --crop and --class-weights balanced are for --dataset folder; give that too")
        return
    if not config["data"]:
        parser.error("--dataset folder: say also where it is, --data DIR")
    out = Path(config["out"] or "runs").resolve()  # also if a link leads there
    if Path(config["data"]).resolve() in out.parents:
        parser.error(f"--out {out}: is inside --data, where it would be taken for images; name another --out")


# Errors in one line

@contextmanager
def one_line_errors(parser: Parser, out: Path | None = None):
    """Inside, what a user can mend ends the program with one line that tells how, and exit status 2.

    out: the folder of the run, once it is known.
    """
    try:
        yield
    except KeyboardInterrupt:
        parser.exit(130, f"\nstopped{how_to_go_on(out)}\n")
    except Diverged as error:
        parser.error(f"{error}: the likely cause is --lr, take a smaller one; {out} holds what was saved before")
    except UserError as error:
        parser.error(str(error).rpartition("DataError: ")[2].strip())  # of a worker, it ends a traceback
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            close_output()
        parser.error(explain(error) + how_to_go_on(out))
    except (RuntimeError, MemoryError) as error:
        from support import processes  # not at the top, as it loads PyTorch
        text = str(error).strip()
        if "worker" in text and "\n" not in text:  # one has died, or opened too many files; a fault in one has more lines
            parser.error(f"{text}; take fewer --workers, or 0")
        if out is None or not processes.is_out_of_memory(error):
            raise
        parser.error(f"out of memory; this tells what would fit: python plan.py --run {shlex.quote(str(out))} "
                     f"--memory {processes.memory_gib():.3g}")


def how_to_go_on(out: Path | None) -> str:
    """The end of a line about a run that stops. out: its folder, if it is known."""
    if out is None or not (out / "last.pt").exists():
        return ""
    return f"; go on with: python train.py --resume {shlex.quote(str(out))}"


def explain(error: OSError, path: Path | None = None) -> str:
    """One line for what the system refuses. path: what it is about, if the error does not tell."""
    where = error.filename or path
    return f"{where}: {error.strerror}" if where else str(error)


def close_output():
    """Nothing more is printed, also not at the end of the program, when Python prints what is left."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
