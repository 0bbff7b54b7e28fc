"""Trained in few tiles, used in many: do tiles of another number, or larger images, need another training?

    OMP_NUM_THREADS=1 python -m experiments.generalise       # 20 minutes of one core
    python -m experiments.generalise --quick                 # seconds

Takes the runs of experiments.qualitative (64x64 pixels in 2x2 tiles), which are trained first where
they are not there. Then, without more training, tests them on 300 new images:
- 64x64 cut in 1x1, 2x2, 4x4 and 8x8: the same images in larger and smaller tiles than those of
  training;
- 128x128 in 4x4 and 256x256 in 8x8: tiles as in training, but more of them. The discs are always in
  neighbouring tiles of 32x32, which keeps them as close as in training.
The plain U-Net always gets the whole image. Writes generalise.md to runs/generalise.
"""

from torch.utils.data import DataLoader

import train
from experiments.common import (CLASS_HEADER, CPU_OR_GPUS, TALKING, WHOLE, class_scores, load, make_folder,
                                make_parser, parse, run_folder, save_table)
from experiments.qualitative import train_model
from synthetic import LinesAndCircles

CASES = {  # side of the image in pixels and tiles in each direction, for each model
    TALKING: [(64, 1), (64, 2), (64, 4), (64, 8), (128, 4), (256, 8)],
    WHOLE: [(64, 1), (128, 1), (256, 1)],
}


def test(model, config: dict, side: int, tiles: int, images: int) -> dict:
    """The scores on square images that were not seen in training, cut in tiles x tiles."""
    size, squares = (side, side), (side // 32, side // 32)
    data = LinesAndCircles(images, size, squares, "test", config["seed"], max_apart=1)
    config = {**config, "image_size": size, "grid": (tiles, tiles)}
    loader = DataLoader(data, config["batch_size"])
    return train.evaluate(model, loader, config, CPU_OR_GPUS)


def main(arguments: list[str] | None = None):
    asked = parse(make_parser(__doc__.splitlines()[0]), arguments)
    images = 4 if asked.quick else 300
    folder = make_folder("generalise", asked.quick)
    runs = make_folder("qualitative", asked.quick)
    table = []
    for name, cases in CASES.items():
        train_model(name, asked.seeds, asked.quick)
        for side, tiles in cases:
            scores = []  # in the form of runs
            for seed in asked.seeds:
                model, config = load(run_folder(runs, name, seed))
                scores.append({"test": test(model, config, side, tiles, images)})
            cells = [name, f"{side}x{side}", f"{tiles}x{tiles}"]
            table.append(cells + class_scores(scores))
    header = ["model", "image", "tiles"] + CLASS_HEADER
    save_table(folder / "generalise.md", header, table)


if __name__ == "__main__":
    main()
