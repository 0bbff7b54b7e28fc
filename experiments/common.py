"""What the experiments share: a training run that is not repeated, a table, a folder for pictures."""

import json
import shutil
import statistics
from pathlib import Path

import train

HERE = Path(__file__).parent
QUICK = "--train-images 32 --epochs 1 --width 2 --comm-channels 4".split()  # options of a run that takes seconds
MODELS = {  # the three-way comparison: options of train.py
    "with communication": [],
    "without communication": ["--comm-channels", "0"],
    "plain U-Net, whole image": ["--grid", "1x1", "--comm-channels", "0"],
}


def trained(out: Path, options: list[str]) -> dict:
    """The metrics of the run in the folder `out`. It is trained now, unless it has been trained before."""
    if not (out / "metrics.json").exists():
        shutil.rmtree(out, ignore_errors=True)  # what an interrupted run left
        print(f"\n{out}: python train.py {' '.join(options)}")
        train.main([*options, "--out", str(out)])
    return json.loads((out / "metrics.json").read_text())


def mean_and_spread(values: list[float]) -> str:
    """`mean (smallest to largest)` of a few runs."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
