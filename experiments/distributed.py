"""What do two processes cost? Training in one process with two threads against two processes with one each.

    python -m experiments.distributed            # six minutes on two CPU cores
    python -m experiments.distributed --quick    # two processes that share images, in seconds

First they share out batches: the network and the images are the defaults of train.py, 64x64 pixels
in 2x2 tiles, 16 images in a batch. Then they share each image, of 512x512 pixels in 2x2 tiles, with
--image-processes 2, width 16 and depth 4. train.py itself, started by torchrun; Gloo on the CPU. The
two take turns. Told is how long a training step took on average. Writes distributed.md to
runs/distributed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from experiments.common import HERE, make_folder, mean_and_spread, save_table
from support.options import Parser

CORES = 2
SMALL = "--grid 2x2 --no-amp --epochs 1 --train-images 480".split()
LARGE = "--grid 2x2 --no-amp --epochs 1 --train-images 32 --batch-size 1 --image-size 512 --width 16 --depth 4".split()
CONTESTS = {  # what is shared by two processes: options of train.py for one process and for two
    "batches": (SMALL, SMALL),
    "images": (LARGE, LARGE + ["--image-processes", "2"]),
}
QUICK = "--train-images 8 --image-size 64 --width 2 --comm-channels 4".split()


def seconds_per_step(processes: int, options: list[str], out: Path) -> float:
    """Of training in so many processes, which share the cores."""
    if not (out / "metrics.json").exists():
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += [str(HERE.parent / "train.py"), *options, "--out", str(out)]
        threads = str(CORES // processes)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(command, check=True, env=environment)
    metrics = json.loads((out / "metrics.json").read_text())
    return metrics["seconds_per_step"]


def main(arguments: list[str] | None = None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    asked = parser.parse_args(arguments)
    contests, rounds, quick = list(CONTESTS), 3, []
    if asked.quick:
        contests, rounds, quick = ["images"], 1, QUICK

    folder = make_folder("distributed", asked.quick)
    table = []
    for shared in contests:
        of_one, of_two = CONTESTS[shared]
        one, two, ratios = [], [], []
        for i in range(rounds):
            one.append(seconds_per_step(1, of_one + quick, folder / f"{shared}-1-round{i}"))
            two.append(seconds_per_step(2, of_two + quick, folder / f"{shared}-2-round{i}"))
            ratios.append(one[-1] / two[-1])
        table.append([shared, mean_and_spread(one), mean_and_spread(two), mean_and_spread(ratios)])
    header = ["shared", "one process, s", "two processes, s", "as fast as one process, times"]
    save_table(folder / "distributed.md", header, table)


if __name__ == "__main__":
    main()
