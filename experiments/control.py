"""Is it the exchange, or only more parameters? The communication network with and without an exchange, and none at all.

    OMP_NUM_THREADS=1 python -m experiments.control          # 20 minutes of one core
    python -m experiments.control --quick                    # seconds

Trains three models with the defaults of train.py and three seeds. The second one has every parameter of the first, but
its communication network works on each tile's part of the coarse map alone, so that no tile hears of another.
Results are added to runs/control/control.csv as they come, and what is there already is not made again. Writes
control.md and control.png beside it.
"""

from pathlib import Path

import matplotlib.pyplot as plt

import plots
from comm_net import CommNet
from decompose import Tiling
from experiments.common import QUICK, append, bar_spread, make_parser, mean_and_spread, read, save_table, trained, where


class Alone(CommNet):
    """The same layers, run on each tile's part of the coarse map as if there were no other. For 2x2 tiles."""

    def forward(self, coarse_map):
        tiling, run = Tiling(coarse_map.shape[-2:], (2, 2)), super().forward
        return tiling.stitch([run(part) for part in tiling.split(coarse_map)])


MODELS = {  # name: (options of train.py, communication network)
    "communication": ([], CommNet),
    "same network, no exchange": ([], Alone),
    "no communication network": (["--comm-channels", "0"], CommNet),
}
CLASSES = ("line", "background", "circle")


def draw(path: Path, results: list[dict]):
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    labels = []
    for i, name in enumerate(MODELS):
        mine = where(results, model=name)
        bar_spread(axes, i, [row["line"] for row in mine], color=f"C{i}", width=0.6)
        size = f"\n{mine[0]['parameters']:,.0f} parameters" if mine else ""
        labels.append(name.replace(", ", ",\n").replace("communication n", "communication\nn") + size)
    axes.set_xticks(range(len(MODELS)), labels)
    axes.set(ylabel="test IoU of the line", ylim=(0, 1), title="Mean of the seeds, and each of them as a dot")
    axes.grid(axis="y", alpha=0.3)
    plots.save(figure, path)


def main(arguments: list[str] | None = None):
    asked = make_parser(__doc__.splitlines()[0]).parse_args(arguments)
    folder, options, seeds = Path("runs/control"), [], asked.seeds
    if asked.quick:
        folder, options, seeds = Path("runs/control-quick"), QUICK, [0]
    folder.mkdir(parents=True, exist_ok=True)

    results = folder / "control.csv"
    for seed in seeds:
        for name, (flags, comm_net) in MODELS.items():
            if where(read(results), model=name, seed=seed):
                continue
            out = folder / f"{name.replace(',', '').replace(' ', '-')}-seed{seed}"
            metrics = trained(out, ["--grid", "2x2", *options, *flags, "--seed", str(seed)], comm_net)
            append(results, [{"model": name, "seed": seed, "parameters": metrics["parameters"],
                              **{label: metrics["test"]["iou"][label] for label in CLASSES},
                              "mean": metrics["test"]["mean_iou"]}])

    table = []
    for name in MODELS:
        mine = where(read(results), model=name)
        if mine:
            table.append([name, f"{mine[0]['parameters']:,.0f}",
                          *(mean_and_spread([row[label] for row in mine]) for label in (*CLASSES, "mean")), len(mine)])
    save_table(folder / "control.md",
               ["model", "parameters", *(f"IoU {label}" for label in CLASSES), "mean IoU", "seeds"], table)
    draw(folder / "control.png", read(results))


if __name__ == "__main__":
    main()
