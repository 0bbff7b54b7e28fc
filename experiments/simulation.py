"""How long would a step take on 1 to 64 GPUs that share one image? From counted operations and bytes, on paper.

    python -m experiments.simulation                                    # 2 minutes of one core
    python -m experiments.simulation --sides 32768 --link 50 --flops 60
    python -m experiments.simulation --quick                            # seconds

Every process has one GPU. The training step of the first one is made on fake tensors, as in
plan.py, and its operations (of the convolutions) and the bytes that it hands over are counted. The
seconds are operations divided by --flops, and bytes divided by --link. It is assumed that

- a GPU makes --flops operations per second, whatever the convolution. The default is what one
  NVIDIA H200 made of this network: a step on 8192x8192 pixels, 534 Tflop by this count, took 3.03
  seconds. That is a fifth of what its vendor says;
- n processes that add up b bytes each send and receive 2 (n - 1) / n b bytes (a ring), at the speed
  of --link. The default is that of one InfiniBand card of 200 Gbit/s;
- nothing is done at the same time: the exchange waits for the tiles, and the tiles for the exchange;
- images are read, and the optimizer and all that is no convolution are done, in no time.

So the times are wrong by a factor, but they tell what grows and what does not. Writes simulation.md to runs/simulation.
"""

import math
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import plan
from experiments.common import make_folder, save_table
from support.model import build_from_config
from support.options import Parser, make_parser, number, parse

TILE = 1024  # pixels to a side of a tile
NETWORK = "--width 64 --depth 4 --comm-channels 64 --batch-size 1 --recompute --amp".split()
HEADER = ["image", "GPUs", "tiles, s", "communication network, s", "exchange, s", "step, s", "speedup", "GiB of a GPU"]


def configure(options: list[str]) -> dict:
    config = parse(NETWORK + ["--gpus", "1", "--out", "none"] + options, make_parser(""))
    config.update(channels=3, classes=range(7), mean=[0.0] * 3, std=[1.0] * 3)
    return config


def count(gpus: int, tiles_each: int) -> tuple[float, float]:
    """Operations, and bytes handed over, of the first of `gpus` processes with so many tiles each, in one row."""
    tiles = gpus * tiles_each
    size = f"{TILE}x{TILE * tiles}"
    config = configure(["--image-size", size, "--grid", f"1x{tiles}", "--image-processes", str(gpus)])
    with FlopCounterMode(display=False) as operations:
        memory, _ = plan.fake_step(config)
    return operations.get_total_flops(), memory.moved[plan.TO_OTHERS]


def straight_line(gpus: int, tiles_each: int) -> tuple[float, float]:
    """The same for any number of tiles. Operations and bytes go up in a straight line with it."""
    if tiles_each <= 2:
        return count(gpus, tiles_each)
    operations_of_one, bytes_of_one = count(gpus, 1)
    operations_of_two, bytes_of_two = count(gpus, 2)
    operations = operations_of_one + (tiles_each - 1) * (operations_of_two - operations_of_one)
    handed_over = bytes_of_one + (tiles_each - 1) * (bytes_of_two - bytes_of_one)
    return operations, handed_over


def count_comm_net(tiles: int) -> float:
    """Operations of the communication network, forwards and backwards, for the coarse map of so many tiles."""
    config = configure([])
    cells = TILE // 2 ** config["depth"]
    with FakeTensorMode(), FlopCounterMode(display=False) as operations:
        comm_net = build_from_config(config).comm_net
        coarse_map = torch.empty(1, config["comm_channels"], cells, cells * tiles, requires_grad=True)
        comm_net(coarse_map).sum().backward()
    return operations.get_total_flops()


def simulate(side: int, gpus: int, flops: float, link: float) -> dict[str, float]:
    """Seconds of the parts of a step. flops: operations per second of a GPU; link: bytes per second of a process."""
    tiles = (side // TILE) ** 2
    tiles_each = math.ceil(tiles / gpus)
    operations, handed_over = straight_line(gpus, tiles_each)
    of_comm_net = count_comm_net(gpus * tiles_each)
    return {
        "tiles": (operations - of_comm_net) / flops,
        "communication network": of_comm_net / flops,
        "exchange": 2 * (gpus - 1) / gpus * handed_over / link,
    }


def what_limits(side: int, one_gpu: float, seconds: dict[str, float]) -> str:
    """A sentence. one_gpu: seconds of a step on one GPU; seconds: of the parts of a step on the most GPUs."""
    largest = max("communication network", "exchange", key=seconds.get)
    stays = seconds["communication network"] + seconds["exchange"]
    return (f"{side}x{side}: the time of the tiles is shared by all GPUs, that of communication network and exchange "
            f"is not. The {largest} is the larger of the two. With {one_gpu / stays:.0f} GPUs the two take half of a "
            "step.")


def peak_gib(side: int, gpus: int) -> float:
    tiles = side // TILE
    config = configure(["--image-size", str(side), "--grid", f"{tiles}x{tiles}", "--image-processes", str(gpus)])
    peak, _ = plan.predict(config)
    return peak["cpu:1"] / 2**30


def main(arguments: list[str] | None = None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=number(TILE), nargs="+", default=[16384, 65536], help="of the image, in pixels")
    parser.add_argument("--flops", type=number(0.001, float), default=176.0, metavar="TFLOP/S", help="of a GPU, in "
                        "bfloat16")
    parser.add_argument("--link", type=number(0.001, float), default=25.0, metavar="GB/S", help="of a process to the "
                        "others")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    asked = parser.parse_args(arguments)
    sides, counts = asked.sides, [1, 2, 4, 8, 16, 32, 64]
    if asked.quick:
        sides, counts = [2048], [1, 2]

    rows = []
    for side in sides:
        one_gpu = None
        for gpus in counts:
            seconds = simulate(side, gpus, asked.flops * 1e12, asked.link * 1e9)
            step = sum(seconds.values())
            if one_gpu is None:
                one_gpu = step
            times = [f"{part:.3f}" for part in seconds.values()]
            rows.append([f"{side}x{side}", str(gpus), *times, f"{step:.3f}", f"{one_gpu / step:.1f}",
                         f"{peak_gib(side, gpus):.1f}"])
            print("  ".join(rows[-1]), flush=True)
        print(what_limits(side, one_gpu, seconds))
    folder = make_folder("simulation", asked.quick)
    save_table(Path(folder, "simulation.md"), HEADER, rows)


if __name__ == "__main__":
    main()
