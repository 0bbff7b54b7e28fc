"""The bare training step against that of the plain U-Net: time and peak memory from 256x256 to 2048x2048 pixels.

    python -m experiments.benchmark --sizes 512 1024 --rounds 3        # 6 minutes on two CPU cores
    python -m experiments.benchmark --quick          # seconds

Forward, loss, backward and Adam on one random image that is there already: no data loading. All contestants take
turns in one process, so that the ratios hold on a machine whose speed drifts; times are medians over the rounds,
after a step to warm up. Peak memory is what the allocator says on a GPU, and on a CPU the sum of all tensors alive
(weights, gradients, Adam's two averages and the image included). Writes runs/benchmark/benchmark.csv and benchmark.png;
the last line of the output is JSON.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.utils._pytree import tree_leaves

import checkpoints
import options
import plots
import train
from decompose import Tiling
from plan import LiveMemory

CONTESTANTS = {"plain U-Net": ("1x1", False), "decomposed": ("grid", False), "decomposed, recompute": ("grid", True)}


class Contestant:
    """One model and one image on it: `step()` is a training step, `seconds()` and `peak_mib()` measure one."""

    def __init__(self, size: int, grid: tuple[int, int], recompute: bool, width: int, depth: int, device: torch.device):
        torch.manual_seed(0)
        k = 0 if grid == (1, 1) else min(32, width * 2**depth)
        self.model = train.build_model({"channels": 1, "classes": "abc", "width": width, "depth": depth, "dropout": 0.1,
                                        "comm_channels": k, "dilations": [1, 1, 1], "recompute": recompute,
                                        "mean": [0.0], "std": [1.0]}).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), fused=True)
        self.tiling, self.device = Tiling((size, size), grid, 2**depth), device
        self.image = torch.rand(1, 1, size, size)
        self.mask = torch.randint(0, 3, (1, size, size), dtype=torch.uint8)

    def step(self):
        self.optimizer.zero_grad()
        train.batch_loss(self.model, self.image, self.mask, self.tiling, [self.device]).backward()
        self.optimizer.step()

    def seconds(self) -> float:
        begun = time.perf_counter()
        self.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    def peak_mib(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.step()
            return torch.cuda.max_memory_allocated() / 2**20
        with LiveMemory() as memory:
            averages = self.optimizer.state_dict()["state"]
            for tensor in tree_leaves([self.model.state_dict(), averages, self.image, self.mask]):
                memory.follow(tensor)
            self.step()
        return memory.peak["cpu"] / 2**20


def measure(size: int, grid: tuple[int, int], width: int, depth: int, rounds: int, device: torch.device) -> list[dict]:
    contestants = {name: Contestant(size, (1, 1) if shape == "1x1" else grid, recompute, width, depth, device)
                   for name, (shape, recompute) in CONTESTANTS.items()}
    for contestant in contestants.values():
        contestant.step()  # warms up, and makes Adam's averages
    peaks = {name: contestant.peak_mib() for name, contestant in contestants.items()}
    times = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            times[name].append(contestant.seconds())
    rows = []
    for name in contestants:
        seconds = statistics.median(times[name])
        ratios = [a / b for a, b in zip(times[name], times["plain U-Net"])]
        rows.append({"size": size, "model": name, "seconds": round(seconds, 4),
                     "megapixels_per_second": round(size**2 / 1e6 / seconds, 4),
                     "peak_mib": round(peaks[name], 1), "time_ratio": round(statistics.median(ratios), 3),
                     "memory_ratio": round(peaks[name] / peaks["plain U-Net"], 4)})
    return rows


def draw(rows: list[dict], path: Path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name in CONTESTANTS:
        mine = [row for row in rows if row["model"] == name]
        pixels = [row["size"] ** 2 for row in mine]
        left.loglog(pixels, [row["seconds"] for row in mine], "o-", label=name)
        right.loglog(pixels, [row["peak_mib"] for row in mine], "o-", label=name)
    left.set(xlabel="pixels", ylabel="seconds per training step")
    right.set(xlabel="pixels", ylabel="peak memory, MiB")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend()
    plots.save(figure, path)


def main(arguments: list[str] | None = None):
    parser = options.Parser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--sizes", type=options.number(1), nargs="+", default=[256, 512, 1024, 2048],
                        help="sides of the image")
    parser.add_argument("--grid", type=options.pair, default="8x8", help="tiles of the decomposed models")
    parser.add_argument("--width", type=options.number(1), default=16, help="channels of the first level")
    parser.add_argument("--depth", type=options.number(1), default=4, help="number of poolings")
    parser.add_argument("--rounds", type=options.number(1), default=5, help="steps of each contestant")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    asked = parser.parse_args(arguments)
    if asked.quick:
        asked.sizes, asked.grid, asked.width, asked.depth, asked.rounds = [32, 64], (2, 2), 2, 2, 1
    folder = Path("runs/benchmark-quick" if asked.quick else "runs/benchmark")
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    rows = []
    for size in asked.sizes:
        rows += measure(size, asked.grid, asked.width, asked.depth, asked.rounds, device)
        for row in rows[-len(CONTESTANTS):]:
            print(f"{size}x{size}  {row['model']:22} {row['seconds']:8.3f} s ({row['time_ratio']:.2f}x)  "
                  f"{row['peak_mib']:8.1f} MiB ({row['memory_ratio']:.3f}x)", flush=True)
        checkpoints.write_log(folder / "benchmark.csv", rows)
        draw(rows, folder / "benchmark.png")
    print(json.dumps({"device": str(device), "threads": torch.get_num_threads(), "torch": torch.__version__,
                      "rows": rows}))


if __name__ == "__main__":
    main()
