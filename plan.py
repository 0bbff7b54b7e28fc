"""What fits? The peak memory of each GPU in a training step, predicted in seconds and without a GPU.

    python plan.py --gpus 4 --image-size 16384 --grid 16x16 --width 64 --depth 4 --batch-size 1 --recompute
    python plan.py --gpus 4 --image-size 2048 --grid 2x2 --width 64 --depth 4 --batch-size 1 --memory 24

The step of train.py runs on fake tensors: they have a shape and a device but no numbers, and cost
nothing. Every tensor that is made is followed until it is freed, and the bytes alive on each device
are added up. The memory that a kernel needs only inside itself (the workspace of a convolution) is
not seen, and neither is what the allocator rounds up. The options are those of train.py; --run
takes those of a run from its folder. With --memory, the size of a GPU, it also tells what would
fit.
"""

import contextlib
import functools
import math
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import train
from decompose import Box, Tiling
from support import processes
from support.command import one_line_errors, open_run
from support.loss import number_of_sums
from support.memory import LiveMemory
from support.model import build_from_config
from support.options import make_parser, number, options_given, parse, tiles_each
from support.sizes import build_tiling, check_sizes


TO_OTHERS = ("this process", "other processes")


# One step on fake tensors

class Phases:
    """The peaks of the phases of a step: from one cut or stitch of an image to the next, forwards and backwards."""

    def __init__(self, memory: LiveMemory):
        self.memory = memory
        self.peaks = []

    def begin(self):
        self.memory.peak = self.memory.live.copy()

    def end(self, *_):
        self.peaks.append(self.memory.peak)
        self.begin()

    def watch(self, tensor: torch.Tensor) -> torch.Tensor:
        """Ends a phase now, and another one when the gradient of the tensor comes."""
        self.end()
        if tensor.requires_grad:
            tensor.register_hook(self.end)
        return tensor

    @contextlib.contextmanager
    def watch_tilings(self):
        split, stitch = Tiling.split, Tiling.stitch

        def watched_split(tiling, x, **options):
            tiles = split(tiling, self.watch(x), **options)
            last = processes.own_tiles(len(tiles))[-1]
            tiles[last] = self.watch(tiles[last])  # its gradient comes first
            return tiles

        def watched_stitch(tiling, tiles, **options):
            return self.watch(stitch(tiling, tiles, **options))

        with mock.patch.object(Tiling, "split", watched_split), mock.patch.object(Tiling, "stitch", watched_stitch):
            yield

    def largest(self) -> Counter:
        largest = Counter()
        for peak in self.peaks:
            largest |= peak  # of each device the larger value
        return largest


@contextlib.contextmanager
def without_random_numbers():
    """Inside, tiles have no seeds of their own for dropout, as fake tensors hold no numbers."""
    def no_seeds(number):
        return [0] * number

    def no_random_numbers(seed, device):
        return contextlib.nullcontext()

    with mock.patch("decompose.draw_seeds", no_seeds), mock.patch("decompose.random_numbers_of", no_random_numbers):
        yield


@contextlib.contextmanager
def one_of_many(process: int, image_processes: int, moved: Counter):
    """Inside, this is one of the processes that share an image. process: its number; image_processes:
    how many there are. The bytes that it hands over to be added up are counted in moved[TO_OTHERS]."""
    def all_reduce(tensor, group):
        moved[TO_OTHERS] += tensor.nbytes

    def rank():
        return process

    with mock.patch.object(processes, "image_processes", image_processes), mock.patch.object(processes, "rank", rank):
        with mock.patch("torch.distributed.all_reduce", all_reduce):
            yield


def keep_gradients_in_buckets(model: torch.nn.Module):
    """The gradients of several processes are added up in memory that is kept from step to step, as
    it is done by DistributedDataParallel."""
    def copy_to_bucket(weight):
        weight.grad = buckets[weight].copy_(weight.grad)

    buckets = {weight: torch.empty_like(weight) for weight in model.parameters()}
    for weight in model.parameters():
        weight.register_post_accumulate_grad_hook(copy_to_bucket)


def fake_step(config: dict, process: int = 0) -> tuple[LiveMemory, list[Counter]]:
    """One training step of train.py. Returns what was alive and moved, and the peaks of its phases.

    GPU i is called "cpu:{i + 1}", a CPU with a number, for which no driver need exist. With `gpus`
    0, "cpu:1" is the CPU of a run without GPUs, and holds the images too. process: which one makes
    the step, of the processes that share an image.
    """
    devices = [torch.device("cpu", i + 1) for i in range(max(config["gpus"], 1))]
    host = devices[0]
    if config["gpus"]:
        host = torch.device("cpu")
    batch, size = config["batch_size"], config["image_size"]
    tiling = build_tiling(config, size)
    memory = LiveMemory()
    phases = Phases(memory)
    shared = config["image_processes"] > 1
    with (memory, FakeTensorMode(), without_random_numbers(),
          one_of_many(process, config["image_processes"], memory.moved)):
        with devices[0]:  # all tensors that are made here are made on it
            model = build_from_config(config)
        for layer in train.batch_norms(model):  # which makes its number of steps on "cpu", whatever is said
            layer.num_batches_tracked = torch.zeros((), dtype=torch.long, device=devices[0])
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        for weight in model.parameters():  # a step that makes Adam's averages
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        optimizer.zero_grad()
        if shared:
            keep_gradients_in_buckets(model)
        images = torch.empty(batch, config["channels"], *size, device=host)
        masks = torch.empty(batch, *size, dtype=torch.uint8, device=host)

        memory.moved.clear()
        phases.begin()
        with phases.watch_tilings():
            loss = train.batch_loss(model, images, masks, tiling, devices, config)
        phases.end()
        loss.backward()
        optimizer.step()
        phases.end()
    if shared:
        sums = 4 * number_of_sums(len(config["classes"]))  # bytes of float32
        memory.moved[TO_OTHERS] += sums + sum(weight.nbytes for weight in model.parameters())
    memory.peak = phases.largest()
    return memory, phases.peaks


# Any number of tiles, any number of processes

def steps_of_fullest(config: dict) -> tuple[Counter, Counter]:
    """Peak bytes of each device, and bytes moved by (from, to); of several processes, the most.

    For each GPU, the step is made of that process whose tiles on it have the most pixels. Of several
    with as many, each has its step made, unless its tiles have the same sizes in the same order.
    """
    tiling = build_tiling(config, config["image_size"])
    fullest_processes = {}  # the sizes of their tiles: one process with these
    for pixels in pixels_of_gpus(config, tiling.halos):
        for process in range(config["image_processes"]):
            if pixels[process] == max(pixels):
                sizes = sizes_of_tiles(tiling, process, config["image_processes"])
                fullest_processes[sizes] = process
    peak, moved = Counter(), Counter()
    for process in fullest_processes.values():
        memory, _ = fake_step(config, process)
        peak |= memory.peak  # of each device the larger value
        moved |= memory.moved
    return peak, moved


def sizes_of_tiles(tiling: Tiling, process: int, image_processes: int) -> tuple[tuple[int, int], ...]:
    """The sizes (h,w) of the tiles of one of the processes that share an image, with their overlap."""
    sizes = []
    for top, bottom, left, right in tiling.halos[process::image_processes]:
        sizes.append((bottom - top, right - left))
    return tuple(sizes)


def predict(config: dict) -> tuple[Counter, Counter]:
    """Peak bytes of each device, and bytes moved by (from, to), in seconds for any number of tiles.

    Up to four tiles for each GPU, the steps themselves are made. With more, two steps are made, in
    which each GPU has three tiles and four, all in a row and as large as the largest tile with its
    overlap. From there on, what a phase needs goes up in a straight line with the number of tiles.
    A smaller tile counts for less than one, by its pixels. With recompute those of the overlap do
    not count, as little is kept of them. Of several processes, the most that one of them needs is
    told for each of its GPUs.
    """
    tiling = build_tiling(config, config["image_size"])
    devices = max(config["gpus"], 1)
    share = devices * config["image_processes"]  # all GPUs that share an image
    if len(tiling) <= 4 * share:
        return steps_of_fullest(config)
    height = max(bottom - top for top, bottom, _, _ in tiling.halos)
    width = max(right - left for _, _, left, right in tiling.halos)

    def row_of_tiles(each: int) -> dict:
        tiles = each * share
        return {**config, "image_size": (height, width * tiles), "grid": (1, tiles), "overlap": 0}

    three, three_peaks = fake_step(row_of_tiles(3))
    four, four_peaks = fake_step(row_of_tiles(4))
    fetched = tiles_of_gpus(config, tiling.halos, height * width)
    kept = fetched
    if config["recompute"]:
        kept = tiles_of_gpus(config, tiling.boxes, height * width)

    peak = Counter()
    for device, tiles in kept.items():
        for three_peak, four_peak in zip(three_peaks, four_peaks):
            needed = extend(three_peak[device], four_peak[device], tiles)
            peak[device] = max(peak[device], needed)

    moved = Counter()
    for way in four.moved:
        # Between the first GPU and another one travels what belongs to the tiles of the other.
        tiles = max(fetched.values())
        for device in way:
            tiles = min(tiles, fetched.get(device, tiles))
        moved[way] = extend(three.moved[way], four.moved[way], tiles)
    return peak, moved


def number_of_pixels(boxes: list[Box]) -> int:
    """In all these boxes together."""
    return sum((bottom - top) * (right - left) for top, bottom, left, right in boxes)


def pixels_of_gpus(config: dict, boxes: list[Box]) -> list[list[int]]:
    """How many pixels the tiles of each GPU have, in each of the processes that share an image. boxes: of all tiles."""
    gpus = max(config["gpus"], 1)
    pixels = []
    for gpu in range(gpus):
        in_processes = []
        for process in range(config["image_processes"]):
            boxes_of_process = boxes[process::config["image_processes"]]  # as in own_tiles, support/processes.py
            in_processes.append(number_of_pixels(boxes_of_process[gpu::gpus]))  # as in place, train.py
        pixels.append(in_processes)
    return pixels


def tiles_of_gpus(config: dict, boxes: list[Box], pixels_of_a_tile: int) -> dict[str, float]:
    """How many tiles each GPU has, counted by the pixels of their boxes; of several processes, the most.

    boxes: of all tiles. pixels_of_a_tile: how many count as one tile.
    """
    tiles = {}
    for gpu, pixels in enumerate(pixels_of_gpus(config, boxes)):
        tiles[f"cpu:{gpu + 1}"] = max(pixels) / pixels_of_a_tile
    return tiles


def extend(of_three: int, of_four: int, tiles: float) -> int:
    """The straight line through the values for three and for four tiles."""
    return round(of_four + (tiles - 4) * (of_four - of_three))


def of_fullest_gpu(peak: Counter) -> int:
    """The bytes of the GPU that needs most. peak: the bytes of each device."""
    largest = 0
    for device, size in peak.items():
        if device != "cpu":  # the host
            largest = max(largest, size)
    return largest


def fullest(config: dict) -> int:
    """Peak bytes of the GPU that needs most."""
    peak, _ = predict(config)
    return of_fullest_gpu(peak)


# What would fit

def largest_image(config: dict, memory: float) -> int:
    """Side of the largest square image, in equal tiles of two cells or more to a side, whose
    training step stays below `memory` bytes on every GPU; 0 if none does.

    Peak memory grows nearly in a straight line with the number of pixels. So where a line through
    two sizes meets `memory`, the next guess is made, and from the last guess it goes up or down in
    the smallest steps that keep the tiles equal.
    """
    tiles = math.lcm(*config["grid"])
    cell = 2 ** config["depth"]
    step = cell * tiles
    smallest = 2 * step  # tiles of a single cell are too small for batch norm

    @functools.cache
    def peak(side: int) -> int:
        return fullest({**config, "image_size": (side, side)})

    def guess(first: int, second: int) -> int:
        slope = (peak(second) - peak(first)) / (second**2 - first**2)
        pixels = max(second**2 + (memory - peak(second)) / slope, 0)
        side = int(math.sqrt(pixels)) // step * step
        return max(side, smallest)

    before = 2 * max(128, cell) * tiles
    side = 2 * before
    for _ in range(4):
        if side != before:
            before, side = side, guess(before, side)
    while peak(side + step) <= memory:
        side += step
    while side >= smallest and peak(side) > memory:
        side -= step
    return side if side >= smallest else 0


def changes_that_save_memory(config: dict) -> list[tuple[str, dict]]:
    """Options as text, and what they change in the configuration. Those that cost least time come first."""
    rows, columns = config["grid"]
    changes = []
    if not config["recompute"]:
        changes.append(("--recompute", {"recompute": True}))
    for gpus in (2, 4, 8, 16, 32, 64):
        if config["gpus"] < gpus <= tiles_each(config):
            changes.append((f"--gpus {gpus}", {"gpus": gpus}))
    for factor in (2, 4, 8, 16):
        grid = factor * rows, factor * columns
        changes.append((f"--grid {grid[0]}x{grid[1]} --recompute", {"grid": grid, "recompute": True}))
    if config["batch_size"] > 1:
        for options, change in list(changes):
            changes.append((f"{options} --batch-size 1", {**change, "batch_size": 1}))
    return changes


def what_fits(config: dict, memory: float) -> list[str]:
    """Up to two changes of the options with which the training step needs at most `memory` bytes on every GPU."""
    found = []
    for options, change in changes_that_save_memory(config):
        try:
            if fullest({**config, **change}) <= memory:
                found.append(options)
        except ValueError:  # a grid that is too fine
            continue
        if len(found) == 2:
            break
    return found


# The command

def print_step(config: dict, peak: Counter, moved: Counter):
    tiling = build_tiling(config, config["image_size"])
    line = f"One training step, {len(tiling)} tiles, batch {config['batch_size']}"
    if config["image_processes"] > 1:
        line += f", for each GPU the fullest of {config['image_processes']} processes that share an image"
    if config["recompute"]:
        line += ", recompute"
    if config["amp"]:
        line += ", bfloat16"
    print(f"{line}:")
    for i in range(config["gpus"]):
        device = f"cpu:{i + 1}"
        exchanged = 0
        for pair, size in moved.items():
            if device in pair and "cpu" not in pair:
                exchanged += size
        print(f"  GPU {i}: peak {peak[device] / 2**20:10,.1f} MiB, "
              f"exchanged with other GPUs {exchanged / 2**20:8,.1f} MiB, "
              f"received from the host {moved['cpu', device] / 2**20:8,.1f} MiB")
    if config["image_processes"] > 1:
        print(f"  each process hands over {moved[TO_OTHERS] / 2**20:,.1f} MiB, to be added up with those of the others")


def print_what_fits(config: dict, gib: float, needed: int):
    """gib: memory of a GPU; needed: bytes of the step on the fullest one."""
    memory = gib * 2**30
    if needed > memory:
        ways = " or ".join(what_fits(config, memory)) or "nothing that is known here; take a smaller image or --width"
        print(f"This needs more than {gib:g} GiB. What would fit: {ways}")
    rows, columns = config["grid"]
    gpus = config["gpus"] * config["image_processes"]
    print(f"Largest square image on {gpus} GPUs of {gib:g} GiB, batch {config['batch_size']}, "
          f"{rows}x{columns} tiles:")
    models = {
        "plain U-Net": {"grid": (1, 1), "gpus": 1, "comm_channels": 0, "recompute": False, "overlap": 0,
                        "image_processes": 1},
        "decomposed": {"recompute": False},
        "decomposed, --recompute": {"recompute": True},
    }
    for name, changes in models.items():
        side = largest_image({**config, **changes}, memory)
        print(f"  {name:24} {side:6} x {side}", flush=True)


def describe_images(config: dict):
    """Adds to the options what train.py would find in the images. DataError: they cannot be cut."""
    check_sizes(config, {config["image_size"]: "--image-size"}, config["batch_size"])
    config["classes"] = range(config["classes"])
    config["mean"] = [0.0] * config["channels"]
    config["std"] = [1.0] * config["channels"]


def refuse_other_options(given: list[str], parser):
    """With --run, the options are those of the run. One that is given beside it ends the program with one line."""
    for option in given:
        if option not in ("--run", "--memory"):
            parser.error(f"--run takes the options of the run; leave {option} out")


def main(arguments: list[str] | None = None):
    parser = make_parser("Predict the peak memory of each GPU in a training step of train.py, without a GPU.")
    parser.add_argument("--run", type=Path, help="folder of a run of train.py whose options are to be taken")
    parser.add_argument("--memory", type=number(0.1, float), metavar="GIB", help="memory of a GPU, to be told also "
                        "what would fit into it")
    parser.add_argument("--channels", type=number(1), default=1, help="channels of the image")
    parser.add_argument("--classes", type=number(2, largest=255), default=3, help="classes of the mask")
    given = options_given(arguments)
    if "--run" in given:
        refuse_other_options(given, parser)
    elif "--data" in given or "--crop" in given:
        parser.error("plan.py looks at no images: give --image-size, --channels and --classes instead of --data, "
                     "--crop and --dataset")
    config = parse(arguments, parser, amp=True)  # as all recent GPUs do
    memory = config["memory"]
    with one_line_errors(parser):
        if config["run"]:
            config, _, _ = open_run(config["run"])
        else:
            describe_images(config)
    config["gpus"] = max(config["gpus"], 1)

    peak, moved = predict(config)
    print_step(config, peak, moved)
    if memory:
        print_what_fits(config, memory, needed=of_fullest_gpu(peak))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
