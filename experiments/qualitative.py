"""What does the communication network do? Figures 5 and 6 of the poster: models on the same test images.

    OMP_NUM_THREADS=1 python -m experiments.qualitative      # 25 minutes of one core
    python -m experiments.qualitative --quick                # seconds

Trains each model with the defaults of train.py and three seeds; a run that is there already is not
repeated. The second model has every parameter of the first, but its communication network works on
each tile's part of the coarse map alone, so that no tile hears of another: is it the exchange, or
only more parameters? Writes qualitative.md, and qualitative.png: image, true mask, and the masks of
three models with the first seed. Runs, table and picture go to runs/qualitative.
"""

from comm_net import CommNet
from decompose import Tiling
from experiments.common import (CLASS_HEADER, MODELS, QUICK, SILENT, TALKING, WHOLE, class_scores, draw_models,
                                make_folder, make_parser, mean_iou, parameters, parse, run_folder, save_table,
                                train_seeds)

NO_EXCHANGE = "same network, no exchange"
ORDER = [TALKING, NO_EXCHANGE, SILENT, WHOLE]


class Alone(CommNet):
    """The same layers, run on each tile's part of the coarse map as if there were no other. For 2x2 tiles."""

    def forward(self, coarse_map):
        tiling = Tiling(coarse_map.shape[-2:], (2, 2))
        parts = []
        for part in tiling.split(coarse_map):
            parts.append(super().forward(part))
        return tiling.stitch(parts)


def train_model(name: str, seeds: list[int], quick: bool) -> list[dict]:
    """The runs of a model with each seed. Other scripts use them too."""
    folder = make_folder("qualitative", quick)
    options = ["--grid", "2x2"]
    if quick:
        options += QUICK
    if name == NO_EXCHANGE:
        return train_seeds(folder, name, options, seeds, Alone)
    return train_seeds(folder, name, options + MODELS[name], seeds)


def main(arguments: list[str] | None = None):
    asked = parse(make_parser(__doc__.splitlines()[0]), arguments)
    folder = make_folder("qualitative", asked.quick)
    table, folders = [], {}
    for name in ORDER:
        runs = train_model(name, asked.seeds, asked.quick)
        table.append([name, *class_scores(runs), mean_iou(runs), parameters(runs)])
        if name in MODELS:
            folders[name] = run_folder(folder, name, asked.seeds[0])
    header = ["model", *CLASS_HEADER, "mean IoU", "parameters"]
    save_table(folder / "qualitative.md", header, table)
    images = [0] if asked.quick else [0, 1, 2, 3]
    draw_models(folder / "qualitative.png", folders, images)


if __name__ == "__main__":
    main()
