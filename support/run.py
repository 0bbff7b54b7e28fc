"""A run: what training changes, kept so that it can go on after an interruption, and what it leaves in its folder.

    last.pt           after every epoch: all that --resume needs to go on as if nothing had happened
    best.pt           the network of the epoch with the best mean IoU on the validation images, and the number of that
                      epoch. If these images lack a class that is to be learned, it is the last epoch instead
    log.csv           a row for each epoch
    metrics.json      at the end: the options, the scores, time and memory
    curves.png        losses and scores of the epochs
    predictions.png   some test images, their masks, and what the network makes of them

Of several processes only the first one writes.
"""

import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from support import checkpoints, plots, processes
from support.checkpoints import CheckpointError
from support.model import weights_to_begin_with
from support.options import show_progress
from support.scores import remarks

STATE = ("config", "rows", "best", "model", "optimizer", "schedule", "order", "random")  # the entries of last.pt


class Diverged(ArithmeticError):
    """The loss is nan or infinite."""


class Run:
    """config, out: the options of the run, and its folder. model, optimizer, schedule, order (the
    generator that shuffles the training images): the objects that training changes; the run reads
    them to save them."""

    def __init__(self, config: dict, out: Path, model, optimizer, schedule, order: torch.Generator):
        self.config = config
        self.out = out
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.order = order
        self.rows = []  # of log.csv
        self.best = None  # the number of the best epoch and its validation scores
        self.started = time.perf_counter()

    def begin(self, state: dict | None):
        """Goes on from a state, or else begins, with the weights of --init if there are any. Prints
        the heading of the table of epochs.

        CheckpointError: the state is that of another network, or of other images; best.pt is that
        of another state; or the weights are those of another network.
        """
        if state is not None:
            self.restore(state)
            processes.from_first(self.repair_best)
            for row in self.rows:
                self.started -= row["seconds"]
        else:
            if self.config.get("init"):
                self.load_weights(Path(self.config["init"]))
            self.save(self.out / "last.pt", self.state())
        heading = "epoch  train loss  val loss"
        for name in self.config["classes"]:
            heading += f"  IoU {name}"
        print(f"{heading}  mean IoU  seconds")

    def load_weights(self, path: Path):
        weights, _ = processes.from_first(weights_to_begin_with, path, self.config)
        self.model.load_state_dict({**self.model.state_dict(), **weights})

    def state(self) -> dict:
        return {"config": self.config, "rows": self.rows, "best": self.best, "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(),
                "order": self.order.get_state(), "random": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]}

    def restore(self, state: dict):
        total_steps = self.schedule.total_steps
        try:
            self.rows = state["rows"]
            for row in self.rows:
                row.setdefault("seconds_waited", 0.0)  # a run that was begun before this was measured
            self.best = state["best"]
            self.number_best()
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.order.set_state(state["order"])
            torch.set_rng_state(state["random"][0])
            for gpu, random in enumerate(state["random"][1:torch.cuda.device_count() + 1]):
                torch.cuda.set_rng_state(random, gpu)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError):
            raise CheckpointError("last.pt: what it holds does not go together; train anew") from None
        if self.schedule.total_steps != total_steps:
            raise CheckpointError(f"the run had {self.schedule.total_steps} steps to make and would now have "
                                  f"{total_steps}, so the images have changed; put them back, or train anew")

    def number_best(self):
        """Older runs did not save the number of the best epoch: it is the first with the scores of the best."""
        if self.best is None or "epoch" in self.best:
            return
        for row in self.rows:
            if row["val_mean_iou"] == self.best["mean_iou"]:
                self.best["epoch"] = row["epoch"]
                return
        self.best["epoch"] = 0

    def repair_best(self):
        """Makes best.pt the network of the best epoch again, which it may not be after a kill between two writes.

        last.pt is written first. So if best.pt has not been written since, last.pt holds the network of the best epoch.
        CheckpointError: neither of the two holds it.
        """
        if self.best is None:
            return
        if self.best_epoch() == self.epochs_done():
            self.save_best()
            return
        path = self.out / "best.pt"
        held = "is missing"
        if path.exists():
            epoch = checkpoints.load(path).get("epoch", self.best_epoch())  # older ones have no number
            if epoch == self.best_epoch():
                return
            held = f"holds epoch {epoch}"
        raise CheckpointError(f"{path}: {held}, but the best of the run was epoch {self.best_epoch()}; put back the "
                              "best.pt that was written with this last.pt, or begin a new run: --init "
                              f"{self.out / 'last.pt'}")

    def save(self, path: Path, state: dict):
        if processes.is_first():
            checkpoints.save(path, state)

    def epochs_done(self) -> int:
        return len(self.rows)

    def best_epoch(self) -> int:
        """The epoch whose weights best.pt holds; 0 before the first."""
        if self.best is None:
            return 0
        return self.best["epoch"]

    def save_last_and_best(self, validation: dict):
        """Saves the run to last.pt, and then its network to best.pt if these validation scores are the best so far.

        If the program is killed between the two, `repair_best` mends it.
        """
        better = self.is_best(validation)
        if better:
            self.best = {"epoch": self.epochs_done(), **validation}
        self.save(self.out / "last.pt", self.state())
        if better:
            self.save_best()

    def is_best(self, validation: dict) -> bool:
        """Whether these are the best validation scores so far. If two epochs have equal scores, the
        later one is better, because more was learned.

        If a class does not occur in the validation masks, the later epoch is always better.
        Otherwise the best could be a network that never finds this class.
        """
        if self.best is None or self.config.get("not_in_val"):
            return True
        return validation["mean_iou"] >= self.best["mean_iou"]

    def save_best(self):
        state = {"config": self.config, "epoch": self.best_epoch(), "model": self.model.state_dict()}
        self.save(self.out / "best.pt", state)

    def load_best(self):
        """The network goes back to the best epoch, in every process."""
        state = processes.from_first(checkpoints.load, self.out / "best.pt")
        self.model.load_state_dict(state["model"])

    def end_epoch(self, epoch: int, loss: float, validation: dict, learning_rate: float, train_seconds: float,
                  seconds_waited: float, seconds: float):
        """Saves the run as it is after an epoch, and prints a row. Diverged: the validation loss is nan or infinite.

        train_seconds: without validation; seconds_waited: for images, among these; seconds: of the whole epoch.
        """
        if not torch.tensor(validation["loss"]).isfinite():
            raise Diverged(f"the loss became {validation['loss']} at the end of epoch {epoch}")
        row = {"epoch": epoch, "train_loss": loss, "val_loss": validation["loss"]}
        for name, score in validation["iou"].items():
            row[f"val_iou_{name}"] = score
        row |= {"val_mean_iou": validation["mean_iou"], "learning_rate": learning_rate, "train_seconds": train_seconds,
                "seconds_waited": seconds_waited, "seconds": seconds}
        self.rows.append(row)
        self.save_last_and_best(validation)
        self.write_log()

        show_progress("")
        line = f"{epoch:5}  {loss:10.4f}  {validation['loss']:8.4f}"
        for name, score in validation["iou"].items():
            line += f"  {score:{len(name) + 4}.4f}"
        print(f"{line}  {validation['mean_iou']:8.4f}  {seconds:7.1f}", flush=True)

    def write_log(self):
        if processes.is_first():
            checkpoints.write_log(self.out / "log.csv", self.rows)

    def finish(self, metrics: dict, pictures: dict[str, list[Tensor]], boxes: list[list], devices: list) -> dict:
        """Writes and prints what the run ends with. Returns what metrics.json holds.

        metrics: test scores and other numbers; pictures: the columns of predictions.png; boxes: the tiles of each row.
        """
        seconds = [row["train_seconds"] for row in self.rows]
        per_step = None
        if self.rows:
            steps_per_epoch = self.schedule.last_epoch / len(self.rows)
            per_step = statistics.median(seconds) / steps_per_epoch
        metrics = {
            "config": self.config,
            "parameters": sum(weight.numel() for weight in self.model.parameters()),
            "seconds_per_step": per_step,
            "train_seconds": sum(seconds),
            "seconds_waited": sum(row["seconds_waited"] for row in self.rows),
            "val": self.best,
            **metrics,
            "seconds": time.perf_counter() - self.started,
            "peak_mib": processes.peak_mib(devices),
        }
        if processes.is_first():
            self.draw(pictures, boxes)
            if self.rows:
                self.write_log()  # a run that was stopped just before it wrote its last row
            checkpoints.write_json(self.out / "metrics.json", metrics)
        self.print_result(metrics)
        return metrics

    def draw(self, pictures: dict[str, list[Tensor]], boxes: list[list]):
        classes, colors = self.config["classes"], self.config["colors"]
        if self.rows:
            with checkpoints.atomic_write(self.out / "curves.png") as unfinished:
                plots.draw_curves(unfinished, self.rows, classes, colors)
        with checkpoints.atomic_write(self.out / "predictions.png") as unfinished:
            plots.draw_predictions(unfinished, pictures, boxes, classes, colors)

    def print_result(self, metrics: dict):
        chosen = "the best epoch"
        if not self.rows:
            chosen = "the network before training"
        elif self.config.get("not_in_val"):
            chosen = "the last epoch"
        print(f"\ntest IoU of {chosen}, in {metrics['seconds']:.0f} seconds:")
        for name, score in metrics["test"]["iou"].items():
            print(f"  {name:12} {score:.4f}")
        print(f"  {'mean':12} {metrics['test']['mean_iou']:.4f}")
        for line in remarks(metrics["test"], self.config):
            print(line)
        loss = metrics["loss_of_training_images"]
        print(losses_line(loss["training_mode"], loss["evaluation_mode"], self.config["freeze_batch_norm"]))
        if metrics["seconds_waited"] > 0.1 * metrics["train_seconds"]:
            print(waiting_line(metrics["seconds_waited"], metrics["train_seconds"]))
        if processes.is_first():
            names = sorted(path.name for path in self.out.iterdir() if not checkpoints.is_unfinished(path))
            print(f"See {self.out}: {', '.join(names)}")


def losses_line(trained: float, used: float, freeze_batch_norm: float) -> str:
    """A line that compares the loss of training images in training mode and in evaluation mode, and
    names the remedy if it is much higher in evaluation mode."""
    line = f"loss of training images: {trained:.4f} in training mode, {used:.4f} in evaluation mode"
    if used > 1.2 * trained + 0.02:
        line += ("; they should be alike, but batch norm has not learned the statistics that it uses: take a smaller "
                 f"--freeze-batch-norm than {freeze_batch_norm:g}, more --epochs, or a larger --batch-size")
    return line


def waiting_line(seconds_waited: float, train_seconds: float) -> str:
    """A line about a training that waited long for its images, and what may help."""
    return (f"training waited {100 * seconds_waited / train_seconds:.0f} % of its time for images; with a GPU, more "
            "--workers read them sooner, and with --crop, .npy files are read much faster than pictures "
            "(docs/own-images.md)")
