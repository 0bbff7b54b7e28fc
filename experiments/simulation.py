"""How long would a step take on 1 to 64 GPUs that share one image? From counted operations and bytes, on paper.

    python -m experiments.simulation                                    # 2 minutes of one core
    python -m experiments.simulation --sides 32768 --link 50 --flops 60
    python -m experiments.simulation --quick                            # seconds

Every process has one GPU. On fake tensors, as in plan.py, the operations of a tile and of the
communication network are counted (those of the convolutions), and the bytes that a process hands
over. The seconds are operations divided by --flops, and bytes divided by --link. It is assumed that

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

import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import plan
from experiments.common import make_folder, save_table
from support.model import build_from_config
from support.options import Parser, number, parse, plan_parser

TILE = 1024  # pixels to a side of a tile
NETWORK = "--channels 3 --classes 7 --width 64 --depth 4 --comm-channels 64".split()
STEP = "--batch-size 1 --recompute --amp --gpus 1".split()
HEADER = ["image", "GPUs", "tiles, s", "communication network, s", "exchange, s", "step, s", "speedup", "GiB of a GPU"]


def configure(side: int, gpus: int) -> dict:
    """Of a step on one image, cut into tiles of TILE x TILE, that so many processes share."""
    tiles = side // TILE
    options = ["--image-size", str(side), "--grid", f"{tiles}x{tiles}", "--image-processes", str(gpus)]
    config = parse(NETWORK + STEP + options, plan_parser())
    plan.describe_images(config)
    return config


def count_operations() -> tuple[int, int]:
    """Of a tile and of its part of the communication network, in a training step."""
    config = configure(TILE, gpus=1)
    with FlopCounterMode(display=False) as all_operations:
        plan.fake_step(config)
    cells = TILE // 2 ** config["depth"]
    with FakeTensorMode(), FlopCounterMode(display=False) as of_comm_net:
        comm_net = build_from_config(config).comm_net
        coarse_map = torch.empty(1, config["comm_channels"], cells, cells, requires_grad=True)
        comm_net(coarse_map).sum().backward()
    in_comm_net = of_comm_net.get_total_flops()
    return all_operations.get_total_flops() - in_comm_net, in_comm_net


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

    of_tile, of_comm_net = count_operations()
    rows = []
    for side in sides:
        tiles = (side // TILE) ** 2
        for gpus in counts:
            peak, moved = plan.predict(configure(side, gpus))
            handed_over = moved["cpu:1", "other processes"]
            for_tiles = math.ceil(tiles / gpus) * of_tile / (asked.flops * 1e12)
            for_comm_net = tiles * of_comm_net / (asked.flops * 1e12)
            for_exchange = 2 * (gpus - 1) / gpus * handed_over / (asked.link * 1e9)
            step = for_tiles + for_comm_net + for_exchange
            if gpus == 1:
                alone = step
            seconds = [f"{part:.3f}" for part in (for_tiles, for_comm_net, for_exchange, step)]
            gib = peak["cpu:1"] / 2**30
            rows.append([f"{side}x{side}", gpus, *seconds, f"{alone / step:.1f}", f"{gib:.1f}"])
    save_table(make_folder("simulation", asked.quick) / "simulation.md", HEADER, rows)


if __name__ == "__main__":
    main()
