"""Train a domain-decomposed U-Net: a plain loop that puts every tile of an image on its GPU by hand.

    python train.py --gpus 4 --dataset synthetic          # four tiles with a communication network
    python train.py --comm-channels 0                     # the same tiles, which know nothing of each other
    python train.py --grid 1x1 --comm-channels 0          # the plain U-Net on the whole image
    python train.py --dataset folder --data DIR           # your own images and masks, see docs/own-images.md
    python train.py --resume runs/NAME                    # go on after the last completed epoch
    torchrun --nproc-per-node 2 train.py --gpus 2         # in two processes, each with half of every batch

Every run leaves a folder with metrics.json, log.csv, best.pt, last.pt, curves.png and predictions.png.

Read it from top to bottom: where each tile lives, the loss, a training step, an epoch, validation,
and `train`, which puts them together. Options, files, resuming and many processes are in support/:
where there is one process, what begins with `processes.` leaves things as they are.
Letters as in decompose.py.
"""

import copy
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from decompose import Tiling, to_device
from support import processes
from support.command import one_line_errors, prepare_run
from support.datasets import build_datasets
from support.loaders import make_loaders, mask_out_fillers
from support.loss import IGNORE, loss_from_sums, loss_sums, number_of_sums
from support.model import build_from_config
from support.options import make_parser, show_progress
from support.plots import Thinned
from support.run import Diverged, Run
from support.scores import confusion, pixels_near_seam, scores
from support.sizes import build_tiling
from support.values import normalise


# Where each tile lives

def place(tiling: Tiling, devices: list[torch.device]) -> list[torch.device]:
    """The device of each tile: tile i lives on cuda:(i mod gpus).

    Where several processes share an image, they take its tiles in turn (see own_tiles in
    support/processes.py), and each deals out its own tiles in this way.
    """
    placement = []
    for i in range(len(tiling)):
        number = i // processes.image_processes  # of the tile among those of its process
        placement.append(devices[number % len(devices)])
    return placement


def run_tiles(model: nn.Module, images: Tensor, tiling: Tiling, devices: list, config: dict,
              finish: Callable) -> list:
    """Images (B,C,H,W) as they are stored, not yet normalised -> finish(i, logits) of every tile i,
    on the tile's device."""
    def prepare(tile):
        return normalise(tile, config["mean"], config["std"], config.get("range"))

    tiles = tiling.split(images)
    placement = place(tiling, devices)
    # In bfloat16 where the user wants it. Without autocast's cache: RoundedWeight in decompose.py tells why.
    device_type = devices[0].type
    with torch.autocast(device_type, torch.bfloat16, enabled=config["amp"], cache_enabled=False):
        return model(tiles, tiling, placement, finish, prepare, recompute=config["recompute"],
                     own=processes.own_tiles(len(tiling)), add_up=processes.sum_over_group)


# The loss

def batch_loss(model: nn.Module, images: Tensor, masks: Tensor, tiling: Tiling, devices: list,
               config: dict) -> Tensor:
    """Images (B,C,H,W), masks (B,H,W) -> the loss, on the first device. Each tile gives its sums,
    and only these travel.

    config: must hold "mean", "std", "amp" and "recompute", and may hold "range" and "loss_weights".
    """
    mask_tiles = tiling.split(masks, overlap=False, fill=IGNORE)
    class_weights = config.get("loss_weights")

    def finish(i, logits):
        mask = to_device(mask_tiles[i], logits.device)
        return loss_sums(logits, mask, class_weights)

    total = 0
    for sums in run_tiles(model, images, tiling, devices, config, finish):
        total = total + sums.to(devices[0])
    return loss_from_sums(processes.all_reduce_sum(total), class_weights)


# A training step

def train_step(model: nn.Module, images: Tensor, masks: Tensor, optimizer, schedule, config: dict,
               devices: list) -> Tensor:
    """Changes the weights once. Returns the loss of the batch."""
    tiling = build_tiling(config, images.shape[-2:])
    loss = batch_loss(model, images, masks, tiling, devices, config)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    return loss.detach()


def set_training_mode(model: nn.Module, frozen: bool):
    """Puts the network into training mode. frozen: batch norm alone is put into evaluation mode, in
    which it uses its running statistics and does not change them. Its scale and shift go on learning.

    By default it is frozen in the second half of the steps. Until then every tile is normalised by
    its own statistics, and in evaluation by the running statistics. Where a step sees few images
    the two differ, and a network that was trained with the first alone fails with the second.
    Source of the idea: Wu, Johnson, "Rethinking 'Batch' in BatchNorm" (arXiv 2105.07576).
    """
    model.train()
    for layer in batch_norms(model):
        layer.train(not frozen)


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    """The layers of batch norm, if it has any."""
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def train_epoch(model: nn.Module, loader, optimizer, schedule, config: dict, devices: list,
                freeze_after: int) -> float:
    """One pass over the training images. Returns the mean loss. Diverged: a loss is nan or infinite.

    freeze_after: the number of steps, counted over all epochs, after which batch norm is frozen.
    That may be before this epoch, in it, or after it.
    """
    steps_done = schedule.last_epoch  # PyTorch's name for the number of steps that the schedule has made
    frozen = steps_done > freeze_after  # in an earlier epoch; where they are equal, the loop below does it
    set_training_mode(model, frozen)
    losses = []
    for images, masks in mask_out_fillers(loader):
        if steps_done == freeze_after:  # once in a training: the statistics become the same everywhere, and are frozen
            frozen = True
            processes.average_buffers(model)
            set_training_mode(model, frozen)
            if batch_norms(model):
                show_progress("")
                print(f"batch norm keeps its statistics after {freeze_after} of {schedule.total_steps} steps")
        loss = train_step(model, images, masks, optimizer, schedule, config, devices)
        losses.append(loss)
        steps_done += 1
        if len(losses) % 50 == 0 or len(losses) == len(loader):  # seldom, because reading a loss waits for the GPUs
            check_losses(losses[-50:], steps_done, len(loader))
        show_progress(f"step {len(losses)} of {len(loader)}")
    if not frozen:
        processes.average_buffers(model)
    return torch.stack(losses).mean().item()


def check_losses(losses: list[Tensor], steps_done: int, steps_per_epoch: int):
    """Diverged: one of the losses of the last steps is nan or infinite."""
    values = torch.stack(losses).tolist()
    for step, loss in enumerate(values, start=steps_done - len(losses)):  # numbered from 0
        if not math.isfinite(loss):
            epoch, step_of_epoch = divmod(step, steps_per_epoch)
            raise Diverged(f"the loss became {loss} at step {step_of_epoch + 1} of epoch {epoch + 1}")


# Validation

@torch.no_grad()
def evaluate(model: nn.Module, loader, config: dict, devices: list) -> dict:
    """Loss and IoU of a split. They are taken over all its pixels at once, and not averaged over images."""
    model.eval()
    classes, class_weights = len(config["classes"]), config.get("loss_weights")
    first = devices[0]
    sums = torch.zeros(number_of_sums(classes), dtype=torch.double, device=first)
    counts = torch.zeros(2, classes, classes, dtype=torch.long, device=first)
    for step, (images, masks) in enumerate(loader, start=1):
        tiling = build_tiling(config, images.shape[-2:])
        mask_tiles = tiling.split(masks, overlap=False, fill=IGNORE)

        def measure(i, logits):
            show_progress(f"evaluating: batch {step} of {len(loader)}, tile {i + 1} of {len(tiling)}")
            mask = to_device(mask_tiles[i], logits.device)
            near_seam = pixels_near_seam(tiling, i, logits.device)
            predicted = logits.argmax(dim=1)
            return loss_sums(logits, mask, class_weights), confusion(predicted, mask, near_seam, classes)

        larger = math.prod(tiling.size) > math.prod(config["image_size"])
        recompute = config["recompute"] or larger  # an image larger than those of training may not fit without it
        settings = {**config, "recompute": recompute}
        for tile_sums, tile_counts in run_tiles(model, images, tiling, devices, settings, measure):
            sums += tile_sums.to(first)
            counts += tile_counts.to(first)
    # Only here do groups of processes wait for each other, so one may have fewer batches than another.
    sums = processes.all_reduce_sum(sums)
    counts = processes.all_reduce_sum(counts)
    return {"loss": loss_from_sums(sums, class_weights).item(), **scores(counts, config["classes"])}


@torch.no_grad()
def compare_modes(model: nn.Module, loader, config: dict, devices: list,
                  frozen: bool) -> dict[str, float]:
    """The mean loss of 16 training images, or of a batch, in training mode and in evaluation mode, without dropout.

    The two should be alike, as a network is used in evaluation mode. frozen: whether batch norm was
    frozen when these weights were saved, or nothing was trained; then the two are the same.
    """
    model = copy.deepcopy(model)  # training mode changes the running statistics
    batches = math.ceil(16 / config["batch_size"])
    losses = {"training_mode": [], "evaluation_mode": []}
    for images, masks in itertools.islice(mask_out_fillers(loader), batches):
        tiling = build_tiling(config, images.shape[-2:])
        for mode in losses:
            model.eval()
            if mode == "training_mode" and not frozen:
                for layer in batch_norms(model):
                    layer.train()
            loss = batch_loss(model, images, masks, tiling, devices, config)
            losses[mode].append(loss.item())
    return {mode: sum(values) / len(values) for mode, values in losses.items()}


# All of it

def train(config: dict, devices: list, out: Path, state: dict | None = None) -> dict:
    """Trains, writes the files of the run to the folder `out`, and returns what metrics.json holds.

    state: what last.pt held, to go on from there. Diverged: the loss is nan or infinite.
    """
    # The images
    datasets = build_datasets(config)
    order = torch.Generator().manual_seed(config["seed"])
    loaders = make_loaders(datasets, config, order)
    steps_per_epoch = len(loaders["train"])
    steps = config["epochs"] * steps_per_epoch

    # The network, the same in every process
    torch.manual_seed(config["seed"])
    model = build_from_config(config).to(devices[0])
    parallel = processes.parallel(model)  # of several processes; of one, the model itself
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(  # sets the learning rate; it cannot have 0 steps
        optimizer, config["lr"], total_steps=max(steps, steps_per_epoch), anneal_strategy="linear")
    freeze_after = max(round(config["freeze_batch_norm"] * steps), 1)  # a step at least, so that there are statistics

    # The run, which keeps what training changes and writes it to its folder
    run = Run(config, out, model, optimizer, schedule, order)
    run.begin(state)
    for epoch in range(run.epochs_done() + 1, config["epochs"] + 1):
        processes.seed(config["seed"], epoch)
        datasets["train"].epoch = epoch  # each epoch has other crops and flips
        started = time.perf_counter()
        learning_rate = schedule.get_last_lr()[0]
        loss = train_epoch(parallel, loaders["train"], optimizer, schedule, config, devices, freeze_after)
        train_seconds = time.perf_counter() - started
        validation = evaluate(model, loaders["val"], config, devices)
        seconds = time.perf_counter() - started
        waited = loaders["train"].seconds_waited
        run.end_epoch(epoch, loss, validation, learning_rate, train_seconds, waited, seconds)

    # The best epoch on images that it has never seen
    if config["epochs"] == 0:  # the network as it was initialised
        run.save_last_and_best(evaluate(model, loaders["val"], config, devices))
    run.load_best()
    datasets["train"].epoch = config["epochs"]  # if all epochs had been done before, the loop has not set it
    frozen = config["epochs"] == 0 or run.best_epoch() * steps_per_epoch > freeze_after
    metrics = {
        "test": evaluate(model, loaders["test"], config, devices),
        "loss_of_training_images": compare_modes(model, loaders["train"], config, devices, frozen),
    }
    pictures, boxes = predict_some(model, datasets["test"], config, devices)
    return run.finish(metrics, pictures, boxes, devices)


@torch.no_grad()
def predict_some(model: nn.Module, dataset, config: dict, devices: list,
                 count: int = 4) -> tuple[dict[str, list[Tensor]], list[list]]:
    """The first images of a data set, their true masks and their predictions, reduced to the size
    of a picture; and the boxes of the tiles in these pictures."""
    model.eval()
    config = {**config, "recompute": True}
    pictures = {"image": [], "true mask": [], "prediction": []}
    boxes = []
    for i in range(min(count, len(dataset))):
        image, mask = dataset[i]
        tiling = build_tiling(config, mask.shape)
        picture = Thinned(tiling)
        true_mask = picture.image(mask)
        prediction = torch.zeros_like(true_mask)

        def write(i, logits):
            picture.write(i, logits.argmax(dim=1)[0], prediction)

        run_tiles(model, image[None], tiling, devices, config, write)
        pictures["image"].append(picture.image(image))
        pictures["true mask"].append(true_mask)
        # Each process wrote its own tiles into zeros.
        pictures["prediction"].append(processes.sum_over_group(prediction))
        boxes.append(picture.boxes())
    return pictures, boxes


def main(arguments: list[str] | None = None):
    parser = make_parser("Train a domain-decomposed U-Net. Without a GPU, every tile is computed on the CPU.")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="folder of a run to go on with after its last "
                        "completed epoch, with its options; only --data, --workers and --image-processes go with it")
    parser.add_argument("--init", type=Path, metavar="CHECKPOINT", help="best.pt of another run, or its folder, to "
                        "begin with its weights (default: weights drawn by the seed)")
    with one_line_errors(parser):
        config, out, state = processes.from_first(prepare_run, arguments, parser)
    with one_line_errors(parser, config, out):
        processes.share_images(config["image_processes"])
        rows, columns = config["grid"]
        devices = processes.find_devices(config["gpus"], f"{rows}x{columns} tiles")
        train(config, devices, out, state)


if __name__ == "__main__":
    with processes.together():
        main()
