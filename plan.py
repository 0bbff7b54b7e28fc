"""What fits? The peak memory of each GPU in a training step, predicted in seconds and without a GPU.

    python plan.py --gpus 4 --image-size 16384 --grid 16x16 --width 64 --depth 4 --batch-size 1 --recompute
    python plan.py --gpus 4 --image-size 2048 --grid 2x2 --width 64 --depth 4 --batch-size 1 --memory 24

The step of train.py runs on fake tensors: they have a shape and a device, but no numbers, and cost nothing. Every
tensor that is made is followed until it is freed, and the storages alive on each device are added up.
What a kernel needs only inside itself (the workspace of a convolution) and what the allocator rounds up is not seen.
The options are those of train.py, and --memory.
"""

import functools
import itertools
import math
import operator
import os
import sys
import weakref
from collections import Counter
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import train
from decompose import Tiling
from image_folder import DataError
from options import build_tiling, check_sizes, make_parser, number, parse


class LiveMemory(TorchDispatchMode):
    """While active, follows every tensor that is made, real or fake. Tensors that are there already: `follow`.

    live, peak: bytes on each device now, and at most so far; a storage counts once, however many views it has.
    moved: bytes copied from one device to another so far, by (from, to).
    """

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.moved = Counter(), Counter(), Counter()
        self.known = set()

    def follow(self, tensor: torch.Tensor):
        storage, device = tensor.untyped_storage(), str(tensor.device)
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.live[device] += storage.nbytes()
            self.peak[device] = max(self.peak[device], self.live[device])
            weakref.finalize(storage, self.forget, storage._cdata, device, storage.nbytes())

    def forget(self, key: int, device: str, size: int):
        self.known.discard(key)
        self.live[device] -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.follow(tensor)
        if function is torch.ops.aten._to_copy.default and out.device != args[0].device:
            self.moved[str(args[0].device), str(out.device)] += out.nbytes
        return out


def without_seeds(devices: list):
    """Stands in for `decompose.recomputed`: fake tensors hold no random numbers, so there are none to repeat."""
    return lambda function, i: checkpoint(function, i, use_reentrant=False, preserve_rng_state=False)


def fake_step(config: dict) -> LiveMemory:
    """One training step, with Adam's averages made before. GPU i is called "cpu:{i + 1}", a CPU with a number, for
    which no driver need exist. With `gpus` 0, "cpu:1" is the CPU of a run without GPUs, and holds the images too.
    phases: the peaks from one cut or stitch to the next, there and back again."""
    devices = [torch.device("cpu", i + 1) for i in range(max(config["gpus"], 1))]
    host = torch.device("cpu") if config["gpus"] else devices[0]
    with LiveMemory() as memory, FakeTensorMode(), mock.patch("decompose.recomputed", without_seeds):
        model = train.build_model(config)
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(weight.detach().to(devices[0])))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(devices[0]))
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        optimizer.zero_grad()
        images = torch.empty(config["batch_size"], config["channels"], *config["image_size"], device=host)
        masks = torch.empty(config["batch_size"], *config["image_size"], dtype=torch.uint8, device=host)
        memory.phases = []

        def end_phase(*_):
            memory.phases.append(memory.peak)
            memory.peak = memory.live.copy()

        def watch(tensor):
            end_phase()
            if tensor.requires_grad:
                tensor.register_hook(end_phase)
            return tensor

        def watched_stitch(tiling, tiles, stitch=Tiling.stitch):
            end_phase()
            return watch(stitch(tiling, tiles))

        def watched_split(tiling, x, split=Tiling.split, **options):
            *others, last = split(tiling, watch(x), **options)
            return [*others, watch(last)]  # whose gradient goes back first

        memory.peak = memory.live.copy()
        memory.moved.clear()
        with mock.patch.multiple(Tiling, stitch=watched_stitch, split=watched_split):
            loss = train.batch_loss(model, images, masks, build_tiling(config, config["image_size"]), devices)
        end_phase()
        loss.backward()
        optimizer.step()
        end_phase()
        memory.peak = functools.reduce(operator.or_, memory.phases)  # the largest
    return memory


def predict(config: dict) -> tuple[Counter, Counter]:
    """Peak bytes of each device, and bytes moved by (from, to), in seconds for any number of tiles: from three and four
    tiles per device on, what each phase of the step needs goes up in a straight line. Uneven tiles are taken to be as large
    as the largest; with an overlap, so are their parts of the image and of the coarse map, which is a little too much."""
    tiling, devices = build_tiling(config, config["image_size"]), max(config["gpus"], 1)
    per_device = -(-len(tiling) // devices)
    if per_device <= 4:
        memory = fake_step(config)
        return memory.peak, memory.moved
    height = max(bottom - top for top, bottom, _, _ in tiling.halos)
    width = max(right - left for _, _, left, right in tiling.halos)
    three, four = (fake_step(config | {"image_size": (height, width * n), "grid": (1, n), "overlap": 0})
                   for n in (3 * devices, 4 * devices))

    def extended(three: Counter, four: Counter) -> Counter:
        return Counter({key: four[key] + (per_device - 4) * (four[key] - three[key]) for key in four})

    return functools.reduce(operator.or_, map(extended, three.phases, four.phases)), extended(three.moved, four.moved)


def largest_image(config: dict, memory: float) -> int:
    """Side of the largest square image, in equal tiles of two cells or more to a side, whose training step stays below
    `memory` bytes on every GPU; 0 if none does. Peak memory grows nearly in a straight line with the number of pixels,
    so two sizes tell where to begin."""
    tile = 2 * max(128, 2 ** config["depth"])  # of two cells at least: batch norm wants more than one
    sides = [pixels * math.lcm(*config["grid"]) for pixels in (tile, 2 * tile)]

    def peak(side: int) -> int:
        found, _ = predict(config | {"image_size": (side, side)})
        return max(size for device, size in found.items() if device != "cpu")

    small, large = map(peak, sides)
    slope = (large - small) / (sides[1] ** 2 - sides[0] ** 2)
    pixels = sides[0] ** 2 + (memory - small) / slope
    step = 2 ** config["depth"] * math.lcm(*config["grid"])
    side = int(math.sqrt(max(pixels, 0))) // step * step
    while side > step and peak(side) > memory:
        side -= step
    return side if side > step else 0


def memory_of(device: torch.device) -> int:
    """Bytes of a GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def what_fits(config: dict, devices: list[torch.device]) -> str:
    """For one who ran out of memory: up to two changes of the command whose training step fits nine tenths of the
    smallest device."""
    memory = 0.9 * min(map(memory_of, devices))
    rows, columns = config["grid"]
    more_gpus = [2**n for n in range(1, 11) if config["gpus"] < 2**n <= rows * columns]
    ways = {"--recompute": {"recompute": True}} | {f"--gpus {n}": {"gpus": n} for n in more_gpus}
    for factor in (2, 4, 8, 16):
        finer = factor * rows, factor * columns
        ways[f"--grid {finer[0]}x{finer[1]} --recompute"] = {"grid": finer, "recompute": True}
    ways |= {f"{way} --batch-size 1": change | {"batch_size": 1} for way, change in ways.items()}

    def fits(change):
        try:
            peak = max(predict(config | change)[0].values())
        except ValueError:
            return False
        return peak <= memory and any(config[name] != value for name, value in change.items())

    found = list(itertools.islice((way for way, change in ways.items() if fits(change)), 2))
    return " or ".join(found) or "none that plan.py knows; take a smaller --crop, --image-size or --width"


def main(arguments: list[str] | None = None):
    parser = make_parser("Predict the peak memory of each GPU in a training step of train.py, without a GPU.")
    parser.add_argument("--memory", type=number(0.1, float), metavar="GIB",
                        help="memory of a GPU: also tells the largest square image that fits (default: not asked)")
    parser.add_argument("--channels", type=number(1), default=1, help="of the image")
    parser.add_argument("--classes", type=number(2, largest=255), default=3, help="of the mask")
    config = parse(arguments, parser, amp=True)  # as all recent GPUs do
    if config["dataset"] != "synthetic" or config["crop"]:
        parser.error("plan.py looks at no images: give --image-size, --channels and --classes instead of --dataset and "
                     "--crop")
    try:
        check_sizes(config, {config["image_size"]: "--image-size"}, config["batch_size"])
    except DataError as error:
        parser.error(str(error))
    config |= {"classes": range(config["classes"]), "gpus": max(config["gpus"], 1),
               "mean": [0.0] * config["channels"], "std": [1.0] * config["channels"]}

    peak, moved = predict(config)
    print(f"One training step, {len(build_tiling(config, config['image_size']))} tiles, batch {config['batch_size']}"
          f"{', recompute' if config['recompute'] else ''}{', bfloat16' if config['amp'] else ''}:")
    for i in range(config["gpus"]):
        device = f"cpu:{i + 1}"
        exchanged = sum(size for pair, size in moved.items() if device in pair and "cpu" not in pair)
        print(f"  GPU {i}: peak {peak[device] / 2**20:10,.1f} MiB, "
              f"exchanged with other GPUs {exchanged / 2**20:8,.1f} MiB, "
              f"received from the host {moved['cpu', device] / 2**20:8,.1f} MiB")
    if config["memory"]:
        print(f"Largest square image on {config['gpus']} GPUs of {config['memory']:g} GiB, batch {config['batch_size']}, "
              "{}x{} tiles:".format(*config["grid"]))
        plain = {"grid": (1, 1), "gpus": 1, "comm_channels": 0, "recompute": False, "overlap": 0}
        for name, changes in {"plain U-Net": plain, "decomposed": {"recompute": False},
                              "decomposed, --recompute": {"recompute": True}}.items():
            side = largest_image(config | changes, config["memory"] * 2**30)
            print(f"  {name:24} {side:6} x {side}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
