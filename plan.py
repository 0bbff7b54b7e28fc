"""What fits? The peak memory of each GPU in a training step, predicted in seconds and without a GPU.

    python plan.py --gpus 4 --image-size 16384 --grid 16x16 --width 64 --depth 4 --batch-size 1 --recompute
    python plan.py --gpus 4 --image-size 2048 --grid 2x2 --width 64 --depth 4 --batch-size 1 --memory 24
    python plan.py --run runs/NAME --gpus 4 --memory 24

The step of train.py runs on fake tensors: they have a shape and a device but no numbers, and cost
nothing. Every tensor that is made is followed until it is freed, and the bytes alive on each device
are added up. The memory that a kernel needs only inside itself (the workspace of a convolution) is
not seen, and neither is what the allocator rounds up. The options are those of train.py; --run
takes those of a run from its folder, and what is given beside it replaces them. With --memory, the
size of a GPU, it also tells what would fit.
"""

import math
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from support.options import UserError, one_line_errors, options_beside, parse, plan_parser, show_progress, tiles_each

if __name__ == "__main__" and "--help" in sys.argv:
    plan_parser().parse_args()  # answers before PyTorch is loaded, which takes seconds

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import train
from decompose import Tiling
from support import checkpoints, processes, scale
from support.folder import class_names, open_folder
from support.images import read_image
from support.memory import LiveMemory
from support.model import build_from_config
from support.sizes import build_tiling, check_sizes

WITH_RUN = ("memory", "gpus", "grid", "batch_size", "image_processes", "recompute", "amp")
FIRST, SECOND = "cpu:1", "cpu:2"  # the first two GPUs, see devices_of
RESERVE = 1  # GiB of a GPU that are left for CUDA itself and the workspaces of its kernels


# One step on fake tensors

def fake_step(config: dict, frozen: bool = False) -> LiveMemory:
    """The memory of this process in one training step of train.py. frozen: whether batch norm keeps its statistics.

    With `gpus` 0, the one device is the CPU of a run without GPUs, which holds the images too. The
    phases of the step begin and end where the communication network does, forwards and backwards.
    """
    devices = devices_of(config)
    host = torch.device("cpu") if config["gpus"] else devices[0]
    no_seeds = [0] * math.prod(config["grid"])  # they cannot be drawn, as fake tensors hold no numbers
    memory = LiveMemory()
    with memory, FakeTensorMode(), mock.patch.object(scale, "draw_seeds", return_value=no_seeds):
        with devices[0]:  # all tensors that are made here are made on it
            model = build_from_config(config)
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):  # which makes its number of steps on the CPU, whatever is said
                layer.num_batches_tracked = torch.zeros((), dtype=torch.long, device=devices[0])
        train.set_training_mode(model, frozen)
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)
        optimizer.step()  # makes Adam's averages
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
        batch, size = config["batch_size"], config["image_size"]
        stored = getattr(torch, config["dtype"] or "float32")
        images = torch.empty(batch, config["channels"], *size, dtype=stored, device=host)
        masks = torch.empty(batch, *size, dtype=torch.uint8, device=host)
        if model.comm_net is not None:
            model.comm_net.register_forward_pre_hook(memory.end_phase)
            model.comm_net.register_forward_hook(memory.end_phase)
            model.comm_net.register_full_backward_pre_hook(memory.end_phase)
            model.comm_net.register_full_backward_hook(memory.end_phase)
        memory.moved.clear()
        memory.peak = memory.live.copy()
        train.train_step(model, images, masks, optimizer, schedule, config, devices)
        memory.end_phase()
    return memory


def devices_of(config: dict) -> list[torch.device]:
    """GPU i is called "cpu:{i + 1}", a CPU with a number, for which no driver need exist."""
    return [torch.device("cpu", i + 1) for i in range(max(config["gpus"], 1))]


# Any number of tiles

def predict(config: dict, frozen: bool = False) -> tuple[Counter, Counter]:
    """Peak bytes of the first GPU and of the second, and bytes moved by (from, to), in one training step.

    The second GPU stands for all others, none of which has more tiles; and of several processes that
    share an image, the first for all. frozen: as in fake_step.
    """
    tiling = build_tiling(config, config["image_size"])
    with first_process(config["image_processes"]):
        few = 16 if config["recompute"] else 64  # take seconds
        if len(tiling) <= max(few, 2 * config["gpus"] * config["image_processes"]):
            memory = fake_step(config, frozen)
            phases, moved = memory.phases, memory.moved
        else:
            *phases, moved = predict_many_tiles(config, frozen, tiling)
    peak = Counter()
    for phase in phases:
        for device in (FIRST, SECOND):
            peak[device] = max(peak[device], phase[device])
    return peak, moved


@contextmanager
def first_process(count: int):
    """Inside, this is the first of `count` processes that share an image. PyTorch's "fake" backend stands for the
    others: it does not exchange anything."""
    if count > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
        processes.share_images(count)
    yield
    if count > 1:
        dist.destroy_process_group()
        processes.image_processes = 1


def predict_many_tiles(config: dict, frozen: bool, tiling: Tiling) -> list[Counter]:
    """The peaks of each phase of a step with many tiles, and after them the bytes moved.

    Three steps with few tiles are made, on two GPUs at most and all in a row, as large as the
    largest tile with its overlap. In two of them each GPU has two tiles and four. From there on,
    all numbers go up in a straight line with the tiles of a GPU (unless the weights outweigh four
    tiles, see docs/what-fits.md). But the first GPU also holds the
    coarse maps of the tiles that others compute. How much that is for each of them is told by the
    third step, in which the last GPU has one tile less than two.
    """
    sizes = [(bottom - top, right - left) for top, bottom, left, right in tiling.halos]
    height, width = max(sizes)
    pixels = sum(math.prod(size) for size in sizes)
    all_tiles = pixels / (height * width)  # a tile that is smaller than the largest counts for less than one
    devices = list(train.place(tiling, devices_of(config)).values())
    of_first = devices.count(torch.device(FIRST)) * all_tiles / len(tiling)
    of_second = devices.count(torch.device(SECOND)) * all_tiles / len(tiling)

    gpus = min(config["gpus"], 2)
    all_gpus = max(gpus, 1) * config["image_processes"]
    steps = []
    for tiles in (2 * all_gpus - 1, 2 * all_gpus, 4 * all_gpus):
        row = {"image_size": (height, width * tiles), "grid": (1, tiles), "overlap": 0, "gpus": gpus}
        memory = fake_step({**config, **row}, frozen)
        steps.append([*memory.phases, memory.moved])
    elsewhere = all_tiles - all_gpus * of_first  # beyond those that go up with the tiles of the first GPU

    predicted = []
    for of_fewer, of_two, of_four in zip(*steps):
        numbers = Counter()
        for name, four in of_four.items():  # the name of a device, or two of them
            two = of_two[name]
            of_each_tile = (four - two) / 2
            if SECOND in name:
                numbers[name] = two + of_each_tile * (of_second - 2)
            else:
                numbers[name] = two + of_each_tile * (of_first - 2) + elsewhere * (two - of_fewer[name])
        predicted.append(numbers)
    return predicted


def fullest_gpu(config: dict) -> float:
    """Peak bytes of the GPU that needs most."""
    peak, _ = predict(config)
    return max(peak.values())


# What would fit

def largest_image(config: dict, memory: float) -> int:
    """Side of the largest square image, in equal tiles of two cells or more to a side, whose
    training step needs at most `memory` bytes on every GPU; 0 if none does.

    A very large image tells how much memory a pixel takes. What is needed beside the pixels, for
    the weights for instance, is told by each size that is tried, and leads to the next one.
    """
    step = 2 ** config["depth"] * math.lcm(*config["grid"])
    side = 1024 * step
    needed = fullest_gpu({**config, "image_size": (side, side)})
    of_pixel = needed / side**2
    for _ in range(10):  # three are usual
        beside = needed - of_pixel * side**2
        pixels = max(memory - beside, 0) / of_pixel
        tried = side
        side = math.isqrt(int(pixels)) // step * step
        side = max(side, 2 * step)  # tiles of a single cell are too small for batch norm
        if abs(side - tried) < 0.02 * side:
            break
        show_progress(f"looking for the largest image: {side} x {side}")
        needed = fullest_gpu({**config, "image_size": (side, side)})
    show_progress("")
    if beside + of_pixel * side**2 > memory:
        return 0
    return side


def what_fits(config: dict, memory: float) -> list[str]:
    """Up to two changes of the options with which the training step needs at most `memory` bytes on
    every GPU, and what they need. Those that cost least time are tried first."""
    rows, columns = config["grid"]
    changes = {"--batch-size 1": {"batch_size": 1}, "--recompute": {"recompute": True}}
    for gpus in (2, 4, 8, 16, 32, 64):
        if config["gpus"] < gpus <= tiles_each(config):
            changes[f"--gpus {gpus}"] = {"gpus": gpus}
    for factor in (2, 4, 8, 16):
        options = f"--grid {factor * rows}x{factor * columns} --recompute --batch-size 1"
        changes[options] = {"grid": (factor * rows, factor * columns), "recompute": True, "batch_size": 1}
    found = []
    for options, change in changes.items():
        show_progress(f"trying {options}")
        try:
            needed = fullest_gpu({**config, **change})
        except ValueError:  # a grid that is too fine
            continue
        if needed <= memory:
            found.append(f"{options} ({needed / 2**30:.1f} GiB)")
        if len(found) == 2:
            break
    show_progress("")
    return found


# The command

def print_step(config: dict, peak: Counter, moved: Counter):
    tiles = math.prod(config["grid"])
    height, width = config["image_size"]
    line = (f"One training step, {height}x{width} pixels, {config['channels']} channels, {len(config['classes'])} "
            f"classes, {tiles} tiles, batch {config['batch_size']}")
    if config["recompute"]:
        line += ", recompute"
    if config["amp"]:
        line += ", bfloat16"
    if config["image_processes"] > 1:
        line += f", the first of {config['image_processes']} processes that share the image"
    print(f"{line}:")
    names = {"cpu": "host", FIRST: "GPU 0", SECOND: "each other GPU", "other processes": "other processes"}
    for device, size in peak.items():
        if size > 0:
            print(f"  {names[device]}: peak {size / 2**20:,.1f} MiB")
    for (start, end), size in moved.items():
        if start in names and end in names:
            print(f"  {names[start]} to {names[end]}: {size / 2**20:,.1f} MiB")
    if config["recompute"] and tiles <= config["gpus"] * config["image_processes"]:
        print("  with one tile on each GPU, --recompute saves no memory: take a finer --grid")


def print_what_fits(config: dict, gib: float, needed: float):
    """gib: memory of a GPU; needed: bytes of the step on the fullest one."""
    memory = (gib - RESERVE) * 2**30
    print(f"Of {gib:g} GiB, {RESERVE} is set aside for CUDA itself, so {gib - RESERVE:g} remain.")
    if needed > memory:
        found = what_fits(config, memory) or ["nothing that is known here; take a smaller image or --width"]
        print("This needs more. What would fit:", " or ".join(found))
    rows, columns = config["grid"]
    gpus = config["gpus"] * config["image_processes"]
    tiles = f"{rows}x{columns} tiles on {gpus} GPUs"
    whole = {"grid": (1, 1), "gpus": 1, "comm_channels": 0, "recompute": False, "overlap": 0, "image_processes": 1}
    models = {
        "plain U-Net, the whole image on one GPU": whole,
        tiles: {"recompute": False},
        f"{tiles}, --recompute": {"recompute": True},
    }
    print(f"Largest square image, batch {config['batch_size']}:")
    for name, changes in models.items():
        side = largest_image({**config, **changes}, memory)
        print(f"  {name:42} {side:6} x {side}", flush=True)


def describe_images(config: dict):
    """Adds to the options what train.py would find in the images, of a folder in the first one. DataError: it cannot
    be read."""
    classes = range(config["classes"])
    config["dtype"] = None
    if config["dataset"] == "folder":
        root = Path(config["data"])
        images = open_folder(root, config["seed"])["train"]
        image = read_image(images.pairs[0][0])
        config["image_size"] = config["crop"] or image.shape[:2]
        config["channels"] = image.shape[2]
        config["dtype"] = str(image.dtype)
        classes = class_names(root) or classes
        if config["crop"] is None:
            config["windows"] = [len(images)]
    channels = config["channels"]
    config.update(classes=classes, loss_weights=None, mean=[0.0] * channels, std=[1.0] * channels)


def main(arguments: list[str] | None = None):
    parser = plan_parser()
    config = parse(arguments, parser)
    memory = config["memory"]
    with one_line_errors(parser):
        if config["run"]:
            given = options_beside("run", WITH_RUN, arguments, parser)
            config = checkpoints.load(Path(config["run"], "last.pt"))["config"] | given
        else:
            describe_images(config)
        windows = config.get("windows") or [config["train_images"]]  # of each image, or of all synthetic ones
        config["batch_size"] = min(config["batch_size"], sum(windows))
        config["gpus"] = max(config["gpus"], 1)
        if config["image_processes"] > math.prod(config["grid"]):
            raise UserError(f"--image-processes {config['image_processes']}: there are fewer tiles; take a finer "
                            "--grid")
        check_sizes(config, {tuple(config["image_size"]): "the image"})

    show_progress("predicting a training step")
    peak, moved = predict(config)
    show_progress("")
    print_step(config, peak, moved)
    if memory:
        print_what_fits(config, memory, max(peak.values()))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
