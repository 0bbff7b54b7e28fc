"""A run: how it begins or goes on, what training changes in it, and what it leaves in its folder.

    last.pt           after every epoch: all that --resume needs to go on as if nothing had happened
    best.pt           the network of the epoch with the best mean IoU on the validation images, and the number of that
                      epoch. If these images lack a class that is to be learned, it is the last epoch instead
    log.csv           a row for each epoch
    metrics.json      at the end: the options, the scores, time and memory
    curves.png        losses and scores of the epochs
    predictions.png   some test images, their masks, and what the network makes of them

Of several processes only the first one writes.
"""

import itertools
import math
from pathlib import Path

from torch import Tensor

from support import checkpoints, plots, processes
from support.datasets import check_unchanged, describe
from support.model import weights_to_begin_with
from support.options import UserError, parse, show_progress
from support.scores import print_scores


# How a run begins, or goes on

def prepare_run(arguments: list[str] | None, parser) -> tuple[dict, Path, dict]:
    """Reads the options, looks at all images, and makes the folder of a new run.

    Returns the configuration, the folder of the run, and the state with which `Run` begins. Ends the program, or raises
    UserError or OSError, if the options, the images and what is on disk do not go together.
    """
    asked = parse(arguments, parser)
    if asked["resume"]:
        return resume_run(asked)
    check_processes(asked)
    config = asked | describe(asked)
    state = {}
    if config["init"]:
        state["model"] = weights_to_begin_with(config)
    return config, make_folder(config), state


def make_folder(config: dict) -> Path:
    """The folder of a new run: --out, or else a new one in runs/. As it is made here, no other run has it, even if both
    begin at the same instant, for only one of them can make it.

    OSError: --out is there already, or cannot be made.
    """
    if config["out"]:
        out = Path(config["out"])
        out.mkdir(parents=True)
        return out
    data = Path(config["data"] or "synthetic").name
    rows, columns = config["grid"]
    return new_folder(f"runs/{data}-{rows}x{columns}-k{config['comm_channels']}-seed{config['seed']}")


def new_folder(name: str) -> Path:
    """Makes the folder `name`, or if that exists already, `name-2`, `name-3`, ..."""
    path = Path(name)
    for i in itertools.count(2):
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            path = Path(f"{name}-{i}")


def resume_run(asked: dict) -> tuple[dict, Path, dict]:
    """A run that goes on, with what `prepare_run` returns. asked: --resume, and what is given with it."""
    out = Path(asked["resume"])
    state = checkpoints.load(out / "last.pt")
    if "rows" not in state:
        raise UserError(f"{out / 'last.pt'}: holds no run, but a network alone; begin a new run with it: --init")
    config = state["config"] | asked
    check_processes(config)
    check_unchanged(config)
    print(f"{out}: {len(state['rows'])} of {config['epochs']} epochs are done")
    return config, out, state


def check_processes(config: dict):
    """UserError: the processes that torchrun has started do not go with the options."""
    started = processes.world_size()
    tiles = math.prod(config["grid"])
    each = config["image_processes"]
    if started % each != 0 or each > tiles:
        raise UserError(f"--image-processes {each}: it must divide the number of processes, {started}, and be at most "
                        f"the number of tiles, {tiles}")
    if config["batch_size"] < started // each:
        raise UserError("--batch-size: each process, or group that shares images, needs at least one image; take "
                        "larger groups (--image-processes), or a larger --batch-size, for images of several sizes with "
                        "--crop")


# The run itself

class Run:
    """config, out: the options of the run, and its folder. model, optimizer, schedule: the objects
    that training changes; the run reads them to save them.

    rows: of log.csv, one for each epoch that is done; best: the number of the best epoch and its
    validation scores, best_weights: its network, on the CPU.
    """

    def __init__(self, config: dict, out: Path, model, optimizer, schedule):
        self.config = config
        self.out = out
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.rows = []
        self.best = None
        self.best_weights = None

    def begin(self, state: dict):
        """Begins, or goes on.

        state: what last.pt held, to go on from there; or {"model": the weights to begin with}; or {}.
        """
        goes_on = "rows" in state
        if "model" in state:
            self.model.load_state_dict(state["model"], strict=goes_on)  # in a new run, the last layer may be missing
        if goes_on:
            self.rows = state["rows"]
            self.best = state["best"]
            self.best_weights = state["best_weights"]
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
        self.write()

    def write(self):
        """Writes the run as it is: last.pt first, which holds everything, so that the other files can be made of it.
        If the program is killed between them, they are written again when the run goes on."""
        if not processes.is_first():
            return
        checkpoints.save(self.out / "last.pt", {
            "config": self.config,
            "rows": self.rows,
            "best": self.best,
            "best_weights": self.best_weights,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        })
        if self.best is not None:
            best = {"config": self.config, "epoch": self.best["epoch"], "model": self.best_weights}
            checkpoints.save(self.out / "best.pt", best)
        if self.rows:
            checkpoints.write_log(self.out / "log.csv", self.rows)

    def load_best(self):
        """The network goes back to the best epoch."""
        self.model.load_state_dict(self.best_weights)

    def save(self, validation: dict):
        """Saves the run. If these are the best validation scores so far, its network is the best one. If two epochs
        have equal scores, the later one is better, because more was learned.

        If a class does not occur in the validation masks, the later epoch is always better.
        Otherwise the best could be a network that never finds this class.
        """
        better = self.best is None or validation["mean_iou"] >= self.best["mean_iou"]
        if better or self.config.get("not_in_val"):
            self.best = {"epoch": len(self.rows), **validation}
            self.best_weights = {}
            for name, weight in self.model.state_dict().items():
                self.best_weights[name] = weight.to("cpu", copy=True)
        self.write()

    def end_epoch(self, loss: float, validation: dict, learning_rate: float, train_seconds: float, seconds: float):
        """Saves the run as it is after an epoch, and prints a line. UserError: the validation loss is nan or infinite.

        train_seconds: without validation; seconds: of the whole epoch.
        """
        epoch = len(self.rows) + 1
        if not math.isfinite(validation["loss"]):
            raise UserError(f"the loss became {validation['loss']} at the end of epoch {epoch}; take a smaller --lr")
        row = {"epoch": epoch, "train_loss": loss, "val_loss": validation["loss"]}
        line = f"epoch {epoch}: train loss {loss:.4f}, val loss {validation['loss']:.4f}, IoU"
        for name, score in validation["iou"].items():
            row[f"val_iou_{name}"] = score
            line += f" {name} {score:.4f},"
        row["val_mean_iou"] = validation["mean_iou"]
        row["learning_rate"] = learning_rate
        row["train_seconds"] = train_seconds
        row["seconds"] = seconds
        self.rows.append(row)
        self.save(validation)
        show_progress("")
        print(f"{line} mean {validation['mean_iou']:.4f}, {seconds:.1f} seconds", flush=True)

    def finish(self, metrics: dict, pictures: dict[str, list[Tensor]], boxes: list, devices: list) -> dict:
        """Writes and prints what the run ends with. Returns what metrics.json holds.

        metrics: test scores and other numbers; pictures: the columns of predictions.png; boxes: the tiles of each row.
        """
        metrics = {
            "config": self.config,
            "parameters": sum(weight.numel() for weight in self.model.parameters()),
            "seconds": sum(plots.column(self.rows, "seconds")),
            "seconds_per_step": sum(plots.column(self.rows, "train_seconds")) / max(self.schedule.last_epoch, 1),
            "val": self.best,
            **metrics,
            "peak_mib": processes.peak_mib(devices),
        }
        if processes.is_first():
            classes, colors = self.config["classes"], self.config["colors"]
            if self.rows:
                plots.draw_curves(self.out / "curves.png", self.rows, classes, colors)
            plots.draw_predictions(self.out / "predictions.png", pictures, boxes, classes, colors)
            checkpoints.write_json(self.out / "metrics.json", metrics)
        epoch = self.best["epoch"]  # 0: before training
        print(f"\ntest IoU of the best epoch, {epoch}, in {metrics['seconds']:.0f} seconds:")
        print_scores(metrics["test"])
        print(f"See {self.out}")
        return metrics
