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

import functools
import math
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from support.options import UserError, one_line_errors, options_beside, parse, plan_parser, show_progress, tiles_each

if __name__ == "__main__" and "--help" in sys.argv:
    plan_parser().parse_args()  # answers before PyTorch is loaded, which takes seconds

import numpy as np
import torch
import torch.distributed as dist
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
RESERVE = 1  # GiB of a GPU that are left for CUDA itself and the workspaces of its kernels


# One step on fake tensors

def fake_step(config: dict, frozen: bool = False) -> LiveMemory:
    """The memory of this process in one training step of train.py. frozen: whether batch norm keeps its statistics.

    GPU i is called "cpu:{i + 1}", a CPU with a number, for which no driver need exist. With `gpus`
    0, "cpu:1" is the CPU of a run without GPUs, and holds the images too. The phases of the step
    begin and end where the communication network does, forwards and backwards.
    """
    devices = devices_of(config)
    host = torch.device("cpu") if config["gpus"] else devices[0]
    memory = LiveMemory()
    with memory, FakeTensorMode(), mock.patch.object(scale, "draw_seeds", no_seeds):
        model = fake_model(config, devices[0])
        train.set_training_mode(model, frozen)
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)
        optimizer.step()  # makes Adam's averages
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
        images = fake_images(config, host)
        masks = torch.empty(images.shape[0], *images.shape[2:], dtype=torch.uint8, device=host)
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
    return [torch.device("cpu", i + 1) for i in range(max(config["gpus"], 1))]


def no_seeds(model: torch.nn.Module, tiling: Tiling) -> list[int]:
    """Seeds for dropout which are not drawn, as fake tensors hold no numbers."""
    return [0] * len(tiling)


def fake_model(config: dict, device: torch.device) -> torch.nn.Module:
    with device:  # all tensors that are made here are made on it
        model = build_from_config(config)
    for layer in train.batch_norms(model):  # which makes its number of steps on the CPU, whatever is said
        layer.num_batches_tracked = torch.zeros((), dtype=torch.long, device=device)
    return model


def fake_images(config: dict, device: torch.device) -> torch.Tensor:
    """A batch as it comes from the loader, in the type in which images are stored."""
    stored = torch.from_numpy(np.empty(0, config["dtype"] or "float32")).dtype
    return torch.empty(config["batch_size"], config["channels"], *config["image_size"], dtype=stored, device=device)


# Any number of tiles

def predict(config: dict) -> tuple[Counter, Counter]:
    """Peak bytes of each device, and bytes moved by (from, to), in seconds for any number of tiles.

    The peak is that of a step in which batch norm learns its statistics or of one in which it keeps
    them, whichever is larger. Of several processes that share an image it is the one whose tiles
    have the most pixels.
    """
    peak, moved = Counter(), Counter()
    with fullest_process(config):
        for frozen in (False, True):
            if frozen and config["recompute"]:
                continue  # one tile at a time in both kinds of steps
            phases, moved_in_step = predict_phases(config, frozen)
            for phase in phases:
                peak |= phase  # of each device the larger value
            moved |= moved_in_step
    return peak, moved


@contextmanager
def fullest_process(config: dict):
    """Inside, this is that of the processes that share an image whose tiles have the most pixels. PyTorch's "fake"
    backend stands for the others: it does not exchange anything."""
    count = config["image_processes"]
    if count > 1:
        pixels = [0] * count
        tiling = build_tiling(config, config["image_size"])
        for i, (top, bottom, left, right) in enumerate(tiling.halos):
            pixels[i % count] += (bottom - top) * (right - left)  # as in own_tiles of support/processes.py
        rank = pixels.index(max(pixels))
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=count)
        processes.share_images(count)
    try:
        yield
    finally:
        if count > 1:
            dist.destroy_process_group()
            processes.image_processes = 1


def predict_phases(config: dict, frozen: bool) -> tuple[list[Counter], Counter]:
    """The peaks of the phases of a step, and the bytes moved in it.

    Up to four tiles for each GPU, the step itself is made. With more, two steps are made, in which
    each GPU has two tiles and four, all in a row and as large as the largest tile with its overlap.
    From there on, what each phase needs goes up in a straight line with the number of tiles. A
    smaller tile counts for less than one, by its pixels.
    """
    tiling = build_tiling(config, config["image_size"])
    all_gpus = max(config["gpus"], 1) * config["image_processes"]
    if len(tiling) <= 4 * all_gpus:
        memory = fake_step(config, frozen)
        return memory.phases, memory.moved

    height = max(bottom - top for top, bottom, _, _ in tiling.halos)
    width = max(right - left for _, _, left, right in tiling.halos)
    steps = []
    for each in (2, 4):
        tiles = each * all_gpus
        row = {"image_size": (height, width * tiles), "grid": (1, tiles), "overlap": 0}
        steps.append(fake_step({**config, **row}, frozen))
    two, four = steps
    tiles_of = Counter()  # each device
    for i, device in train.place(tiling, devices_of(config)).items():
        top, bottom, left, right = tiling.halos[i]
        tiles_of[str(device)] += (bottom - top) * (right - left) / (height * width)

    phases = []
    for phase_of_two, phase_of_four in zip(two.phases, four.phases):
        phase = Counter()
        for device, tiles in tiles_of.items():
            phase[device] = extend(phase_of_two[device], phase_of_four[device], tiles)
        phases.append(phase)
    moved = Counter()
    for way in four.moved:
        # Between the first GPU and another one travels what belongs to the tiles of the other.
        tiles = max(tiles_of.values())
        for device in way:
            tiles = min(tiles, tiles_of.get(device, tiles))
        moved[way] = extend(two.moved[way], four.moved[way], tiles)
    return phases, moved


def extend(of_two: int, of_four: int, tiles: float) -> int:
    """The straight line through the values for two and for four tiles."""
    return round(of_four + (tiles - 4) * (of_four - of_two) / 2)


def fullest_gpu(config: dict) -> int:
    """Peak bytes of the GPU that needs most."""
    peak, _ = predict(config)
    return max(size for device, size in peak.items() if device != "cpu")  # "cpu" is the host


# What would fit

def largest_image(config: dict, memory: float) -> int:
    """Side of the largest square image, in equal tiles of two cells or more to a side, whose
    training step stays below `memory` bytes on every GPU; 0 if none does.

    Peak memory grows nearly in a straight line with the number of pixels. It begins with two sizes
    so large that the weights do not matter. Where the line through them meets `memory` is the guess,
    from which it goes up or down in the smallest steps that keep the tiles equal.
    """
    step = 2 ** config["depth"] * math.lcm(*config["grid"])
    smallest = 2 * step  # tiles of a single cell are too small for batch norm

    @functools.cache
    def peak(side: int) -> int:
        show_progress(f"looking for the largest image: {side} x {side}")
        return fullest_gpu({**config, "image_size": (side, side)})

    large, larger = 1024 * step, 2048 * step
    slope = (peak(larger) - peak(large)) / (larger**2 - large**2)
    pixels = max(large**2 + (memory - peak(large)) / slope, 0)
    side = max(int(math.sqrt(pixels)) // step * step, smallest)
    while peak(side + step) <= memory:
        side += step
    while side >= smallest and peak(side) > memory:
        side -= step
    show_progress("")
    return side if side >= smallest else 0


def changes_that_save_memory(config: dict) -> list[tuple[str, dict]]:
    """Options as text, and what they change in the configuration. Those that cost least time come first."""
    rows, columns = config["grid"]
    changes = []
    if config["batch_size"] > 1:
        changes.append(("--batch-size 1", {"batch_size": 1}))
    if not config["recompute"]:
        changes.append(("--recompute", {"recompute": True}))
    for gpus in (2, 4, 8, 16, 32, 64):
        if config["gpus"] < gpus <= tiles_each(config):
            changes.append((f"--gpus {gpus}", {"gpus": gpus}))
    for factor in (2, 4, 8, 16):
        grid = factor * rows, factor * columns
        changes.append((f"--grid {grid[0]}x{grid[1]} --recompute", {"grid": grid, "recompute": True}))
    if config["batch_size"] > 1:
        for options, change in changes[1:]:
            changes.append((f"{options} --batch-size 1", {**change, "batch_size": 1}))
    return changes


def what_fits(config: dict, memory: float) -> list[str]:
    """Up to two changes of the options with which the training step needs at most `memory` bytes on
    every GPU, and what they need."""
    found = []
    for options, change in changes_that_save_memory(config):
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
    tiling = build_tiling(config, config["image_size"])
    line = f"One training step, {len(tiling)} tiles, batch {config['batch_size']}"
    if config["image_processes"] > 1:
        line += f", the fullest of {config['image_processes']} processes that share an image"
    if config["recompute"]:
        line += ", recompute"
    if config["amp"]:
        line += ", bfloat16"
    print(f"{line}:")
    for i in range(config["gpus"]):
        device = f"cpu:{i + 1}"
        exchanged = 0
        for way, size in moved.items():
            if device in way and "cpu" not in way and "other processes" not in way:
                exchanged += size
        print(f"  GPU {i}: peak {peak[device] / 2**20:10,.1f} MiB, "
              f"exchanged with other GPUs {exchanged / 2**20:8,.1f} MiB, "
              f"received from the host {moved['cpu', device] / 2**20:8,.1f} MiB")
    if config["image_processes"] > 1:
        handed_over = moved["cpu:1", "other processes"]
        print(f"  each process hands over {handed_over / 2**20:,.1f} MiB, to be added up with those of the others")
    if config["recompute"] and len(tiling) <= config["gpus"] * config["image_processes"]:
        print("  with one tile on each GPU, --recompute saves no memory: take a finer --grid")


def print_what_fits(config: dict, gib: float, needed: int):
    """gib: memory of a GPU; needed: bytes of the step on the fullest one."""
    memory = (gib - RESERVE) * 2**30
    print(f"Of {gib:g} GiB, {RESERVE} is set aside for CUDA itself, so {gib - RESERVE:g} remain.")
    if needed > memory:
        ways = " or ".join(what_fits(config, memory)) or "nothing that is known here; take a smaller image or --width"
        print(f"This needs more. What would fit: {ways}")
    rows, columns = config["grid"]
    gpus = config["gpus"] * config["image_processes"]
    print(f"Largest square image, batch {config['batch_size']}:")
    whole = {"grid": (1, 1), "gpus": 1, "comm_channels": 0, "recompute": False, "overlap": 0, "image_processes": 1}
    tiles = f"{rows}x{columns} tiles on {gpus} GPUs"
    models = {
        "plain U-Net, the whole image on one GPU": whole,
        tiles: {"recompute": False},
        f"{tiles}, --recompute": {"recompute": True},
    }
    for name, changes in models.items():
        side = largest_image({**config, **changes}, memory)
        print(f"  {name:42} {side:6} x {side}", flush=True)


def describe_images(config: dict):
    """Adds to the options what train.py would find in the images, of a folder in the first one. DataError: they
    cannot be cut, or read."""
    config["dtype"] = None
    if config["dataset"] == "folder":
        root = Path(config["data"])
        images = open_folder(root, config["seed"])["train"]
        image = read_image(images.pairs[0][0])
        config["image_size"] = config["crop"] or image.shape[:2]
        config["channels"] = image.shape[2]
        config["dtype"] = str(image.dtype)
        config["classes"] = len(class_names(root) or range(config["classes"]))
        if config["crop"] is None:
            config["batch_size"] = min(config["batch_size"], len(images))
    weights = config["class_weights"] or ["balanced"]
    if weights != ["balanced"] and len(weights) != config["classes"]:
        raise UserError(f"--class-weights: {len(weights)} numbers, but there are {config['classes']} classes")
    config["classes"] = range(config["classes"])
    config["loss_weights"] = None
    config["mean"] = [0.0] * config["channels"]
    config["std"] = [1.0] * config["channels"]


def main(arguments: list[str] | None = None):
    parser = plan_parser()
    config = parse(arguments, parser)
    memory = config["memory"]
    with one_line_errors(parser):
        if config["run"]:
            given = options_beside("run", WITH_RUN, arguments, parser)
            config = checkpoints.load(Path(config["run"], "last.pt"))["config"] | given
            windows = config.get("windows") or [config["train_images"]]  # of each image, or of all synthetic ones
            config["batch_size"] = min(config["batch_size"], sum(windows))
        else:
            describe_images(config)
        config["gpus"] = max(config["gpus"], 1)
        check_sizes(config, {tuple(config["image_size"]): "the image"})
        if config["image_processes"] > math.prod(config["grid"]):
            raise UserError(f"--image-processes {config['image_processes']}: there are fewer tiles; take a finer --grid")

    peak, moved = predict(config)
    print_step(config, peak, moved)
    if memory:
        needed = max(size for device, size in peak.items() if device != "cpu")
        print_what_fits(config, memory, needed)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
