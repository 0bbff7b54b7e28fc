"""Figure 7 of the poster: how many channels must the tiles exchange? Line IoU against K, at several depths.

    OMP_NUM_THREADS=1 python -m experiments.comm_channels                           # 80 minutes of one core
    OMP_NUM_THREADS=1 python -m experiments.comm_channels --depths 3 --channels 0 4 --seeds 0    # a part of it
    python -m experiments.comm_channels --quick                                     # seconds

Trains with the defaults of train.py (64x64 pixels in 2x2 tiles) but for depth, K and seed, and takes the test IoU of
every class. A K that is larger than the coarse map has channels is left out: at depth 2 that has 32.
Results are added to runs/comm_channels/comm_channels.csv as they come, what is there already is not made again, and two
processes with different --depths, --channels or --seeds may run side by side. Writes comm_channels.md and
comm_channels.png beside it.
"""

from pathlib import Path

import matplotlib.pyplot as plt

import plots
from experiments.common import (QUICK, append, make_parser, mean_and_spread, plot_spread, read, save_table, trained,
                                where)
from options import number

CLASSES = ("line", "background", "circle")
WIDTH = 8  # train.py's default


def draw(path: Path, results: list[dict]):
    """The line on the left, the classes that a tile can find alone on the right; a colour for each depth."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for i, depth in enumerate(sorted({row["depth"] for row in results})):
        mine = where(results, depth=depth)
        plot_spread(left, mine, "channels", "line", marker="o", color=f"C{i}", label=f"depth {depth:.0f}")
        for name, style in (("background", "-"), ("circle", ":")):
            plot_spread(right, mine, "channels", name, marker=".", linestyle=style, color=f"C{i}",
                        label=f"{name}, depth {depth:.0f}")
    ticks = sorted({int(row["channels"]) for row in results})
    for axes in (left, right):
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
        axes.set(xlabel="communicated channels K", ylabel="test IoU")
        axes.grid(alpha=0.3)
        if results:
            axes.legend(fontsize=9)
    left.set(title="line", ylim=(-0.02, 1))
    right.set(title="background and circle")
    plots.save(figure, path)


def main(arguments: list[str] | None = None):
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--depths", type=number(1), nargs="+", default=[2, 3, 4], help="poolings")
    parser.add_argument("--channels", type=number(0), nargs="+", default=[0, 1, 4, 16, 64], help="communicated, K")
    asked = parser.parse_args(arguments)
    folder, options, width = Path("runs/comm_channels"), [], WIDTH
    if asked.quick:
        folder, options, width = Path("runs/comm_channels-quick"), QUICK, 2
        asked.seeds, asked.depths, asked.channels = [0], [1, 2], [0, 8]
    folder.mkdir(parents=True, exist_ok=True)

    results = folder / "comm_channels.csv"
    for seed in asked.seeds:
        for depth in asked.depths:
            for k in asked.channels:
                if k > width * 2**depth or where(read(results), depth=depth, channels=k, seed=seed):
                    continue
                metrics = trained(folder / f"depth{depth}-k{k}-seed{seed}",
                                  ["--grid", "2x2", *options, "--depth", str(depth), "--comm-channels", str(k),
                                   "--seed", str(seed)])
                append(results, [{"depth": depth, "channels": k, "seed": seed, "parameters": metrics["parameters"],
                                  **{name: metrics["test"]["iou"][name] for name in CLASSES}}])

    rows, table = read(results), []
    for depth, k in sorted({(row["depth"], row["channels"]) for row in rows}):
        mine = where(rows, depth=depth, channels=k)
        table.append([f"{depth:.0f}", f"{k:.0f}", f"{mine[0]['parameters']:,.0f}",
                      *(mean_and_spread([row[name] for row in mine]) for name in CLASSES), len(mine)])
    save_table(folder / "comm_channels.md", ["depth", "K", "parameters", *(f"IoU {name}" for name in CLASSES), "seeds"],
               table)
    draw(folder / "comm_channels.png", rows)


if __name__ == "__main__":
    main()
