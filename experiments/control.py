"""Is it the exchange, or only more parameters? The communication network with and without an exchange, and none at all.

    OMP_NUM_THREADS=1 python -m experiments.control          # 20 minutes of one core
    python -m experiments.control --quick                    # seconds

Trains three models with the defaults of train.py and three seeds. The second one has every
parameter of the first, but its communication network works on each tile's part of the coarse map
alone, so that no tile hears of another. Results are added to runs/control/control.csv as they come,
and what is there already is not made again. Writes control.md and control.png beside it.
"""

from pathlib import Path

import matplotlib.pyplot as plt

from comm_net import CommNet
from decompose import Tiling
from experiments.common import (CLASS_HEADER, CLASSES, QUICK, append_rows, bar_spread, class_scores, column, file_name,
                                is_measured, make_folder, make_parser, parameters, read_rows, save_table,
                                spread_of_columns, trained, where)
from support import plots


class Alone(CommNet):
    """The same layers, run on each tile's part of the coarse map as if there were no other. For 2x2 tiles."""

    def forward(self, coarse_map):
        tiling = Tiling(coarse_map.shape[-2:], (2, 2))
        parts = []
        for part in tiling.split(coarse_map):
            parts.append(super().forward(part))
        return tiling.stitch(parts)


MODELS = {  # name: (options of train.py, communication network)
    "communication": ([], CommNet),
    "same network, no exchange": ([], Alone),
    "no communication network": (["--comm-channels", "0"], CommNet),
}
LABELS = {  # of the bars
    "communication": "communication",
    "same network, no exchange": "same network,\nno exchange",
    "no communication network": "no communication\nnetwork",
}


def measure(case: dict, folder: Path, options: list[str]) -> dict:
    """The row of a case. Its model is trained now, unless it has been trained before."""
    model, seed = case["model"], case["seed"]
    of_model, comm_net = MODELS[model]
    out = folder / f"{file_name(model)}-seed{seed}"
    metrics = trained(out, ["--grid", "2x2"] + options + of_model + ["--seed", str(seed)], comm_net)
    return {
        **case,
        "parameters": metrics["parameters"],
        **class_scores(metrics["test"]),
        "mean": metrics["test"]["mean_iou"],
    }


def save_scores(path: Path, rows: list[dict]):
    table = []
    for name in MODELS:
        mine = where(rows, model=name)
        if mine:
            scores = spread_of_columns(mine, CLASSES + ["mean"])
            table.append([name, parameters(mine)] + scores + [len(mine)])
    save_table(path, ["model", "parameters"] + CLASS_HEADER + ["mean IoU", "seeds"], table)


def draw(path: Path, rows: list[dict]):
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    labels = []
    for i, name in enumerate(MODELS):
        mine = where(rows, model=name)
        bar_spread(axes, i, column(mine, "line"), color=f"C{i}", width=0.6)
        label = LABELS[name]
        if mine:
            label += f"\n{parameters(mine)} parameters"
        labels.append(label)
    axes.set_xticks(range(len(MODELS)), labels)
    axes.set(ylabel="test IoU of the line", ylim=(0, 1), title="Mean of the seeds, and each of them as a dot")
    axes.grid(axis="y", alpha=0.3)
    plots.save(figure, path)


def main(arguments: list[str] | None = None):
    asked = make_parser(__doc__.splitlines()[0]).parse_args(arguments)
    options = []
    if asked.quick:
        options = QUICK
        asked.seeds = [0]

    folder = make_folder("control", asked.quick)
    results = folder / "control.csv"
    for seed in asked.seeds:
        for name in MODELS:
            case = {"model": name, "seed": seed}
            if not is_measured(results, case):
                append_rows(results, [measure(case, folder, options)])

    rows = read_rows(results)
    save_scores(folder / "control.md", rows)
    draw(folder / "control.png", rows)


if __name__ == "__main__":
    main()
