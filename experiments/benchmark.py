"""The bare training step against that of the plain U-Net: time and peak memory from 256x256 to 2048x2048 pixels.

    python -m experiments.benchmark                                       # 5 minutes on two CPU cores
    python -m experiments.benchmark --sizes 8192 --grid 16x16 --only "recompute, bf16" --rounds 1    # 10 minutes
    python -m experiments.benchmark --distributed                         # two processes against one: distributed.py
    python -m experiments.benchmark --quick                               # seconds

Forward, loss, backward and Adam on one random image that is there already: no data loading. All contestants take
turns in one process, so that the ratios hold on a machine whose speed drifts; times are medians over the rounds,
after a step to warm up. Peak memory is what the allocator says on a GPU, and on a CPU the sum of all tensors alive
(weights, gradients, Adam's two averages and the image included). Contestants that the memory does not hold are shown
as such. Writes runs/benchmark/benchmark.csv and benchmark.png; the last line of the output is JSON.
On Linux the C library's ways with large tensors show in the times of large images, and in the memory of the process:
"What it costs" in the README has the variables to put in front of the command.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import NullLocator
from torch.utils._pytree import tree_leaves

import checkpoints
import options
import plan
import plots
import processes
import train
from experiments import distributed

torch.backends.cudnn.allow_tf32 = False  # float32 shall be float32 on a GPU too
PLAIN = {"grid": (1, 1), "comm_channels": 0}
CONTESTANTS = {"plain U-Net": PLAIN, "plain U-Net, bf16": PLAIN | {"amp": True}, "decomposed": {},
               "decomposed, bf16": {"amp": True}, "decomposed, frozen": {"frozen": True},
               "recompute": {"recompute": True}, "recompute, bf16": {"recompute": True, "amp": True},
               "recompute, frozen": {"recompute": True, "frozen": True}}  # frozen: batch norm keeps its statistics
COLORS = {"plain U-Net": "C0", "decomposed": "C1", "recompute": "C2"}
LINES = {"": "-", "bf16": "--", "frozen": ":"}
FIRST = "plain U-Net"  # whose time and memory are 1


class Contestant:
    """One model and one image on it: `step()` is a training step, `seconds()` and `peak_mib()` measure one."""

    def __init__(self, config: dict, device: torch.device):
        self.before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        torch.manual_seed(0)
        self.model = train.build_model(config).to(device)
        train.set_training(self.model, config["frozen"])
        self.optimizer = torch.optim.Adam(self.model.parameters(), fused=True)
        self.tiling, self.device = options.build_tiling(config, config["image_size"]), device
        self.image = torch.rand(1, config["channels"], *config["image_size"])
        self.mask = torch.randint(0, len(config["classes"]), (1, *config["image_size"]), dtype=torch.uint8)
        self.step()  # warms up, and makes Adam's averages

    def step(self):
        self.optimizer.zero_grad()
        train.batch_loss(self.model, self.image, self.mask, self.tiling, [self.device]).backward()
        self.optimizer.step()

    def seconds(self) -> float:
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        begun = time.perf_counter()
        self.step()
        wait()
        return time.perf_counter() - begun

    def peak_mib(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.step()
            return (torch.cuda.max_memory_allocated() - self.before) / 2**20
        with plan.LiveMemory() as memory:
            averages = self.optimizer.state_dict()["state"]
            for tensor in tree_leaves([self.model.state_dict(), averages, self.image, self.mask]):
                memory.follow(tensor)
            self.step()
        return memory.peak["cpu"] / 2**20


def enter(config: dict, device: torch.device) -> tuple[Contestant, float] | None:
    """A contestant and its peak, or None if it does not fit: calculated before on a CPU, where to try is to be killed."""
    if device.type == "cpu" and plan.predict(config)[0]["cpu:1"] > 0.9 * plan.memory_of(device):
        return None
    try:
        contestant = Contestant(config, device)
        return contestant, contestant.peak_mib()
    except torch.OutOfMemoryError:
        return None


def measure(config: dict, names: list[str], rounds: int, device: torch.device) -> list[dict]:
    entered = {name: enter(config | CONTESTANTS[name], device) for name in names}
    times = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            times[name].append(entered[name][0].seconds() if entered[name] else None)
    rows, (height, width) = [], config["image_size"]
    for name in names:
        row = dict.fromkeys(("size", "model", "seconds", "megapixels_per_second", "peak_mib", "time_ratio", "memory_ratio"))
        row |= {"size": height, "model": name}
        if entered[name]:
            seconds = statistics.median(times[name])
            row |= {"seconds": round(seconds, 4), "megapixels_per_second": round(height * width / 1e6 / seconds, 4),
                    "peak_mib": round(entered[name][1], 1)}
            if entered.get(FIRST):
                row["time_ratio"] = round(statistics.median(a / b for a, b in zip(times[name], times[FIRST])), 3)
                row["memory_ratio"] = round(entered[name][1] / entered[FIRST][1], 4)
        rows.append(row)
    return rows


def draw(rows: list[dict], path: Path):
    """Time and memory against pixels; a cross at the upper edge where a contestant ran out of memory."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, value, label in zip(panels, ("seconds", "peak_mib"), ("seconds per training step", "peak memory, MiB")):
        for name in CONTESTANTS:
            mine = [row for row in rows if row["model"] == name]
            fits, full = ([row for row in mine if (row[value] is not None) == known] for known in (True, False))
            network, _, variant = name.partition(", ")
            style = {"color": COLORS[network], "linestyle": LINES[variant]}
            if mine:
                axes.loglog([row["size"] ** 2 for row in fits], [row[value] for row in fits], marker="o", label=name,
                            **style)
            for row in full:
                axes.plot(row["size"] ** 2, 0.96, "x", color=style["color"], transform=axes.get_xaxis_transform())
        sizes = sorted({row["size"] for row in rows})
        axes.set_xticks([size**2 for size in sizes], [f"{size}x{size}" for size in sizes])
        axes.set(xlabel="image (x: out of memory)" if None in [row[value] for row in rows] else "image", ylabel=label)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    if rows:
        panels[0].legend()
    plots.save(figure, path)


def say(row: dict) -> str:
    if row["seconds"] is None:
        return f"{row['size']}x{row['size']}  {row['model']:22} out of memory"
    slower, larger = (f" ({row[name]:.{digits}f}x)" if row[name] is not None else ""
                      for name, digits in (("time_ratio", 2), ("memory_ratio", 3)))
    return (f"{row['size']}x{row['size']}  {row['model']:22} {row['seconds']:8.3f} s{slower}  "
            f"{row['peak_mib']:8.1f} MiB{larger}")


def main(arguments: list[str] | None = None):
    parser = options.Parser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    option, number = parser.add_argument, options.number
    option("--sizes", type=number(16), nargs="+", default=[256, 512, 1024, 2048], help="sides of the image")
    option("--grid", type=options.pair, default="8x8", help="tiles of the decomposed models")
    option("--width", type=number(1), default=16, help="channels of the first level")
    option("--depth", type=number(1), default=4, help="number of poolings")
    option("--channels", type=number(1), default=1, help="of the image")
    option("--classes", type=number(2), default=3, help="of the mask")
    option("--comm-channels", type=number(0), default=32, help="communicated channels")
    option("--rounds", type=number(1), default=3, help="steps of each contestant")
    option("--only", default="", metavar="WORD", help="contestants with this word in their name")
    option("--distributed", action="store_true", help="two processes against one instead; see experiments/distributed.py")
    option("--quick", action="store_true", help="a smoke run")
    asked = parser.parse_args(arguments)
    if asked.distributed:
        return distributed.main(asked.quick)
    if asked.quick:
        asked.sizes, asked.grid, asked.width, asked.depth, asked.rounds, asked.comm_channels = [64], (2, 2), 2, 2, 1, 8
    names = [name for name in CONTESTANTS if asked.only in name]
    config = {"width": asked.width, "depth": asked.depth, "channels": asked.channels, "classes": range(asked.classes),
              "dropout": 0.1, "comm_channels": asked.comm_channels, "dilations": [1, 1, 1], "recompute": False, "amp": False,
              "frozen": False, "mean": [0.0] * asked.channels, "std": [1.0] * asked.channels, "grid": asked.grid, "overlap": 0,
              "batch_size": 1, "gpus": 0}
    for size in asked.sizes:
        try:
            options.build_tiling(config | {"image_size": (size, size)}, (size, size))
        except ValueError as error:
            parser.error(f"--sizes {size}: {error}")
    folder = Path("runs/benchmark-quick" if asked.quick else "runs/benchmark")
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")

    rows = []
    for size in asked.sizes:
        rows += measure(config | {"image_size": (size, size)}, names, asked.rounds, device)
        print("\n".join(say(row) for row in rows[-len(names):]), flush=True)
        checkpoints.write_log(folder / "benchmark.csv", rows)
        draw(rows, folder / "benchmark.png")
    print(json.dumps({"device": str(device), "threads": torch.get_num_threads(), "torch": torch.__version__,
                      "peak_mib_of_the_process": processes.peak_mib([device]), "rows": rows}))


if __name__ == "__main__":
    main()
