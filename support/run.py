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
import time
from pathlib import Path

import torch
from torch import Tensor

from support import checkpoints, plots, processes
from support.datasets import check_unchanged, describe
from support.model import load_model, weights_to_begin_with
from support.options import Diverged, UserError, parse, show_progress, tiles_each
from support.scores import print_scores


# How a run begins, or goes on

def prepare_run(arguments: list[str] | None, parser) -> tuple[dict, Path, dict]:
    """Reads the options, makes the folder of a new run, and looks at all images.

    Returns the configuration, the folder of the run, and the state with which `Run` begins. Ends the program, or raises
    UserError or OSError, if the options, the images and what is on disk do not go together.
    """
    asked = parse(arguments, parser)
    if asked["resume"]:
        return resume_run(asked)
    check_processes(asked)
    out = make_folder(asked)
    state = {}
    try:
        config = asked | describe(asked) | {"out": str(out)}
        if config["init"]:
            state["model"] = first_weights(config)
    except BaseException:  # also Ctrl-C
        out.rmdir()  # nothing is in it yet
        raise
    return config, out, state


def make_folder(asked: dict) -> Path:
    """The folder of a new run. As it is made here, no other run has it, even if both begin at the same instant.

    OSError: it is there already, or cannot be made.
    """
    if asked["out"]:
        out = Path(asked["out"])
        out.mkdir(parents=True)
        return out
    data = Path(asked["data"] or "synthetic").name
    rows, columns = asked["grid"]
    return new_folder(f"runs/{data}-{rows}x{columns}-k{asked['comm_channels']}-seed{asked['seed']}")


def new_folder(name: str) -> Path:
    """Makes the folder `name`, or if that exists already, `name-2`, `name-3`, ...

    Of two programs that do this at the same time each gets a folder of its own, as only one of them can make it.
    """
    path = Path(name)
    for i in itertools.count(2):
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            path = Path(f"{name}-{i}")


def first_weights(config: dict) -> dict:
    """The weights of --init. CheckpointError: they do not fit."""
    weights, classes = weights_to_begin_with(Path(config["init"]), config)
    print(f"the run begins with the weights of {config['init']}")
    if classes != config["classes"]:
        print(f"its classes are others ({', '.join(classes)}), so the last layer is drawn anew")
    return weights


def resume_run(asked: dict) -> tuple[dict, Path, dict]:
    """A run that goes on, with what `prepare_run` returns. asked: what is given with --resume."""
    config, out, state = open_run(Path(asked["resume"]))
    config.update(asked["changes"])
    check_processes(config)
    if "image_processes" in asked["changes"]:  # each of them may now have another number of tiles for its GPUs
        config["gpus"] = min(processes.gpus_each(), tiles_each(config))
    check_unchanged(config)
    done = len(state["rows"])
    line = f"{out}: {done} of {config['epochs']} epochs are done"
    if done == config["epochs"]:
        line += "; to train longer, begin a new run with its weights: --init"
    print(line)
    return config, out, state


def open_run(out: Path) -> tuple[dict, Path, dict]:
    """The configuration of a run that is to go on, its folder, and the content of its last.pt.

    CheckpointError, OSError: the folder holds no last.pt, or it cannot be used.
    """
    path = out / "last.pt"
    state = checkpoints.load(path, ("rows", "best_weights"))
    _, config = load_model(path)  # which also finds out whether the weights fit
    return config, out, state


def check_processes(config: dict):
    """UserError: the processes that torchrun has started do not go with the options."""
    rows, columns = config["grid"]
    started, each = processes.world_size(), config["image_processes"]
    if started % each != 0 or each > rows * columns:
        raise UserError(f"--image-processes {each}: there are {started} processes, and {rows * columns} tiles for those "
                        f"that share an image; take a divisor of {started}, and no more than there are tiles")
    groups = started // each
    if config["batch_size"] < groups:
        raise UserError(f"--batch-size {config['batch_size']}: {groups} processes, or groups that share an image, need "
                        f"at least as many images; let the processes share each image (--image-processes {started}), "
                        "or take a larger --batch-size, for images of several sizes with --crop")


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
        self.started = time.perf_counter()

    def begin(self, state: dict):
        """Begins, or goes on. Prints the heading of the table of epochs.

        state: what last.pt held, to go on from there; or {"model": the weights to begin with}; or {}.
        """
        if "rows" in state:
            self.restore(state)
        elif "model" in state:
            self.model.load_state_dict(state["model"], strict=False)
        self.write()
        heading = "epoch  train loss  val loss"
        for name in self.config["classes"]:
            heading += f"  IoU {name}"
        print(f"{heading}  mean IoU  seconds", flush=True)

    def restore(self, state: dict):
        self.rows = state["rows"]
        self.best = state["best"]
        self.best_weights = state["best_weights"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])
        torch.cuda.set_rng_state_all(state["random_gpus"][:torch.cuda.device_count()])
        for row in self.rows:
            self.started -= row["seconds"]

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
            "random": torch.get_rng_state(),
            "random_gpus": torch.cuda.get_rng_state_all(),
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
        """Saves the run as it is after an epoch, and prints a row. Diverged: the validation loss is nan or infinite.

        train_seconds: without validation; seconds: of the whole epoch.
        """
        epoch = len(self.rows) + 1
        if not math.isfinite(validation["loss"]):
            raise Diverged(f"the loss became {validation['loss']} at the end of epoch {epoch}")
        row = {"epoch": epoch, "train_loss": loss, "val_loss": validation["loss"]}
        line = f"{epoch:5}  {loss:10.4f}  {validation['loss']:8.4f}"
        for name, score in validation["iou"].items():
            row[f"val_iou_{name}"] = score
            line += f"  {score:{len(name) + 4}.4f}"
        row["val_mean_iou"] = validation["mean_iou"]
        row["learning_rate"] = learning_rate
        row["train_seconds"] = train_seconds
        row["seconds"] = seconds
        self.rows.append(row)
        self.save(validation)
        show_progress("")
        print(f"{line}  {validation['mean_iou']:8.4f}  {seconds:7.1f}", flush=True)

    def finish(self, metrics: dict, pictures: dict[str, list[Tensor]], boxes: list, devices: list) -> dict:
        """Writes and prints what the run ends with. Returns what metrics.json holds.

        metrics: test scores and other numbers; pictures: the columns of predictions.png; boxes: the tiles of each row.
        """
        train_seconds = sum(plots.column(self.rows, "train_seconds"))
        metrics = {
            "config": self.config,
            "parameters": sum(weight.numel() for weight in self.model.parameters()),
            "seconds_per_step": train_seconds / max(self.schedule.last_epoch, 1),
            "val": self.best,
            **metrics,
            "seconds": time.perf_counter() - self.started,
            "peak_mib": processes.peak_mib(devices),
        }
        if processes.is_first():
            classes, colors = self.config["classes"], self.config["colors"]
            if self.rows:
                with checkpoints.atomic_write(self.out / "curves.png") as unfinished:
                    plots.draw_curves(unfinished, self.rows, classes, colors)
            with checkpoints.atomic_write(self.out / "predictions.png") as unfinished:
                plots.draw_predictions(unfinished, pictures, boxes, classes, colors)
            checkpoints.write_json(self.out / "metrics.json", metrics)
        self.print_result(metrics)
        return metrics

    def print_result(self, metrics: dict):
        epoch = self.best["epoch"]  # 0: before training
        print(f"\ntest IoU of the best epoch, {epoch}, in {metrics['seconds']:.0f} seconds:")
        print_scores(metrics["test"])
        print(f"See {self.out}")
