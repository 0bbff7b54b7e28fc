"""The table and the picture of docs/steps.md: the five programs side by side, and one tile against four.

    python -m experiments.steps              # 5 minutes on two quiet cores
    python -m experiments.steps --quick      # seconds

Writes steps.md and steps.png to runs/steps. Times are those of the processor, as a ratio to step 1.
"""

import copy
import statistics
import time

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from decompose import Tiling
from experiments import step1, step2, step3, step4, step5
from experiments.common import make_folder, save_table
from support import plots
from support.model import build_model
from support.options import Parser
from synthetic import LinesAndCircles
from train import set_training_mode

PROGRAMS = {
    "1: the plain U-Net": step1,
    "2: tiles": step2,
    "3: communication": step3,
    "4: devices": step4,
    "5: forgetting": step5,
}
SIZE = (32, 256)  # of the images of which one tile is compared with four
GRIDS = {  # label: (grid, overlap in pixels)
    "one tile": ((1, 1), 0),
    "no overlap": ((1, 4), 0),
    "overlap of 48 pixels": ((1, 4), 48),
}


# The five programs

def seconds_of_steps(models: list, rounds: int) -> list[float]:
    """The median time of the processor for a training step of each model, measured in turn."""
    images, masks = next(iter(DataLoader(LinesAndCircles(8), batch_size=8)))
    seconds = [[] for _ in models]
    for _ in range(rounds):
        for model, mine in zip(models, seconds):
            model.train()
            started = time.process_time()
            cross_entropy(model(images), masks.long()).backward()
            mine.append(time.process_time() - started)
    return [statistics.median(mine) for mine in seconds]


def run_programs(steps: int, rounds: int) -> tuple[dict, list]:
    """The losses of each program, and the rows of the table."""
    models, curves, rows = [], {}, []
    for name, program in PROGRAMS.items():
        print(name)
        model, losses, (iou, peak) = program.main(steps)
        models.append(model)
        curves[name] = losses
        rows.append([name, f"{iou:.3f}", f"{peak:.1f}"])
    seconds = seconds_of_steps(models, rounds)
    for row, mine in zip(rows, seconds):
        row.append(f"{mine / seconds[0]:.2f}")
    return curves, rows


# One tile against four

def train_in_tiles(model, grid: tuple[int, int], overlap: int, steps: int) -> list[float]:
    """The losses of a decomposed U-Net of depth 3, in float64, on the same images every time.

    Not with Adam, which divides a gradient by its size: so it lets the rounding of the smallest ones grow.
    """
    tiling = Tiling(SIZE, grid, cell=8, overlap=overlap)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for images, masks in DataLoader(LinesAndCircles(4 * steps, SIZE, grid=(1, 8)), batch_size=4):
        optimizer.zero_grad()
        logits = model(tiling.split(images.double()), tiling)
        loss = cross_entropy(tiling.stitch(logits), masks.long())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def compare_grids(steps: int) -> dict[str, list[float]]:
    """The losses of each of GRIDS, from the same network whose batch norm has its statistics and keeps them."""
    torch.manual_seed(0)
    start = build_model(channels=1, classes=3).double()
    train_in_tiles(start, (1, 1), 0, steps // 2)
    set_training_mode(start, frozen=True)
    curves = {}
    for label, (grid, overlap) in GRIDS.items():
        curves[label] = train_in_tiles(copy.deepcopy(start), grid, overlap, steps)
    return curves


# The picture

WINDOW = 10  # training steps, over which losses are averaged for the eye


def averaged(losses: list[float]) -> tuple[list[int], list[float]]:
    """The mean of every WINDOW losses, and the step at which each window begins."""
    begins, means = [], []
    for begin in range(0, len(losses), WINDOW):
        begins.append(begin)
        means.append(statistics.mean(losses[begin:begin + WINDOW]))
    return begins, means


def differences(losses: list[float], others: list[float]) -> list[float]:
    """The relative difference of each two losses, at least 1e-17, as a logarithmic axis has no 0."""
    return [max(abs(loss - other) / other, 1e-17) for loss, other in zip(losses, others)]


def draw(path, programs: dict[str, list[float]], grids: dict[str, list[float]]):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    widths = [1, 1, 6, 3, 1]  # narrower where curves lie on each other
    for (name, losses), width in zip(programs.items(), widths):
        left.plot(*averaged(losses), linewidth=width, label=name)
    for label in ("no overlap", "overlap of 48 pixels"):
        right.plot(differences(grids[label], grids["one tile"]), label=label)
    left.set_title(f"The five programs, mean of {WINDOW} training steps each")
    left.set_ylabel("loss")
    right.set_title("Four tiles against one, batch norm frozen")
    right.set_ylabel("relative difference of the losses")
    for axes in (left, right):
        axes.set(xlabel="training step", yscale="log")
        axes.legend()
    plots.save(figure, path)


def main(arguments: list[str] | None = None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    asked = parser.parse_args(arguments)
    programs_steps, rounds, grid_steps = 400, 30, 100
    if asked.quick:
        programs_steps, rounds, grid_steps = 2, 1, 2
    folder = make_folder("steps", asked.quick)
    curves, rows = run_programs(programs_steps, rounds)
    save_table(folder / "steps.md", ["step", "line IoU", "memory in MiB", "time"], rows)
    draw(folder / "steps.png", curves, compare_grids(grid_steps))


if __name__ == "__main__":
    main()
