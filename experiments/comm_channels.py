"""Figure 7 of the poster: how many channels must the tiles exchange? Line IoU against K, at several depths.

    OMP_NUM_THREADS=1 python -m experiments.comm_channels                           # 80 minutes of one core
    OMP_NUM_THREADS=1 python -m experiments.comm_channels --depths 3 --channels 0 4 --seeds 0    # a part of it
    python -m experiments.comm_channels --quick                                     # seconds

Trains with the defaults of train.py (64x64 pixels in 2x2 tiles) but for depth, K and seed, and
takes the test IoU of every class. A K that is larger than the coarse map has channels is left out:
at depth 2 that has 32. Results are added to runs/comm_channels/comm_channels.csv as they come, what
is there already is not made again, and two processes with different --depths, --channels or --seeds
may run side by side. Writes comm_channels.md and comm_channels.png beside it.
"""

from pathlib import Path

import matplotlib.pyplot as plt

from experiments.common import (CLASS_HEADER, CLASSES, QUICK, append_rows, class_scores, different, is_measured,
                                make_folder, make_parser, parameters, plot_spread, read_rows, save_table,
                                spread_of_columns, trained, where)
from support import plots
from support.options import number

WIDTH = 8  # train.py's default


def measure(case: dict, folder: Path, options: list[str]) -> dict:
    """The row of a case. Its model is trained now, unless it has been trained before."""
    depth, channels, seed = case["depth"], case["channels"], case["seed"]
    out = folder / f"depth{depth}-k{channels}-seed{seed}"
    of_case = ["--depth", str(depth), "--comm-channels", str(channels), "--seed", str(seed)]
    metrics = trained(out, ["--grid", "2x2"] + options + of_case)
    return {**case, "parameters": metrics["parameters"], **class_scores(metrics["test"])}


def save_scores(path: Path, rows: list[dict]):
    table = []
    for depth in different(rows, "depth"):
        of_depth = where(rows, depth=depth)
        for channels in different(of_depth, "channels"):
            mine = where(of_depth, channels=channels)
            cells = [f"{depth:.0f}", f"{channels:.0f}", parameters(mine)]
            table.append(cells + spread_of_columns(mine, CLASSES) + [len(mine)])
    save_table(path, ["depth", "K", "parameters"] + CLASS_HEADER + ["seeds"], table)


def draw(path: Path, rows: list[dict]):
    """The line on the left, the classes that a tile can find alone on the right; a colour for each depth."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for i, depth in enumerate(different(rows, "depth")):
        mine = where(rows, depth=depth)
        color = f"C{i}"
        name = f"depth {depth:.0f}"
        plot_spread(left, mine, "channels", "line", marker="o", color=color, label=name)
        plot_spread(right, mine, "channels", "background", marker=".", linestyle="-", color=color,
                    label=f"background, {name}")
        plot_spread(right, mine, "channels", "circle", marker=".", linestyle=":", color=color,
                    label=f"circle, {name}")
    ticks = [int(channels) for channels in different(rows, "channels")]
    for axes in (left, right):
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
        axes.set(xlabel="communicated channels K", ylabel="test IoU")
        axes.grid(alpha=0.3)
        if rows:
            axes.legend(fontsize=9)
    left.set(title="line", ylim=(-0.02, 1))
    right.set(title="background and circle")
    plots.save(figure, path)


def main(arguments: list[str] | None = None):
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--depths", type=number(1), nargs="+", default=[2, 3, 4], help="poolings")
    parser.add_argument("--channels", type=number(0), nargs="+", default=[0, 1, 4, 16, 64], help="communicated, K")
    asked = parser.parse_args(arguments)
    options = []
    width = WIDTH
    if asked.quick:
        options = QUICK
        width = 2
        asked.seeds = [0]
        asked.depths = [1, 2]
        asked.channels = [0, 8]

    folder = make_folder("comm_channels", asked.quick)
    results = folder / "comm_channels.csv"
    for seed in asked.seeds:
        for depth in asked.depths:
            for channels in asked.channels:
                case = {"depth": depth, "channels": channels, "seed": seed}
                if channels <= width * 2**depth and not is_measured(results, case):
                    append_rows(results, [measure(case, folder, options)])

    rows = read_rows(results)
    save_scores(folder / "comm_channels.md", rows)
    draw(folder / "comm_channels.png", rows)


if __name__ == "__main__":
    main()
