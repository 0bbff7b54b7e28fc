"""Figure 7 of the poster: how many channels must the tiles exchange? Line IoU against K, at several depths.

    OMP_NUM_THREADS=1 python -m experiments.comm_channels                           # half an hour of one core
    OMP_NUM_THREADS=1 python -m experiments.comm_channels --depths 3 --channels 0 4 --seeds 0    # a part of it
    python -m experiments.comm_channels --quick                                     # seconds

Trains with the defaults of train.py (64x64 pixels in 2x2 tiles) but for depth, K and seed. A K that
is larger than the coarse map has channels is left out: at depth 2 that has 32. What has been trained
before is not trained again. Writes comm_channels.md and comm_channels.png to runs/comm_channels.
"""

from pathlib import Path

import matplotlib.pyplot as plt

from experiments.common import (CLASS_HEADER, QUICK, class_scores, make_folder, make_parser, parameters,
                                parse, plot_spread, save_table, train_seeds)
from support import plots
from support.options import number

WIDTH = 8  # train.py's default


def draw(path: Path, results: dict[int, dict]):
    """A panel for the line and one for the circle, a line in it for each depth.

    results: for each depth the runs of each K.
    """
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axes, name in zip(panels, ("line", "circle")):
        for depth, of_depth in results.items():
            values = {}
            for channels, runs in of_depth.items():
                values[channels] = [run["test"]["iou"][name] for run in runs]
            plot_spread(axes, values, marker="o", label=f"depth {depth}")
        axes.set_xscale("symlog", linthresh=1)
        axes.set(title=name, xlabel="communicated channels K", ylabel="test IoU")
        axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.3)
        axes.legend()
    plots.save(figure, path)


def main(arguments: list[str] | None = None):
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--depths", type=number(1), nargs="+", default=[2, 3], help="poolings")
    parser.add_argument("--channels", type=number(0), nargs="+", default=[0, 1, 4, 16, 64], help="communicated, K")
    asked = parse(parser, arguments)
    options = ["--grid", "2x2"]
    width = WIDTH
    if asked.quick:
        options += QUICK
        width = 2
        asked.depths = [1, 2]
        asked.channels = [0, 8]

    folder = make_folder("comm_channels", asked.quick)
    results = {depth: {} for depth in asked.depths}
    table = []
    for depth in asked.depths:
        for channels in asked.channels:
            if channels > width * 2**depth:
                continue
            of_case = ["--depth", str(depth), "--comm-channels", str(channels)]
            runs = train_seeds(folder, f"depth{depth}-k{channels}", options + of_case, asked.seeds)
            results[depth][channels] = runs
            table.append([depth, channels, parameters(runs), *class_scores(runs)])
    save_table(folder / "comm_channels.md", ["depth", "K", "parameters", *CLASS_HEADER], table)
    draw(folder / "comm_channels.png", results)


if __name__ == "__main__":
    main()
