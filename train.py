"""Train a domain-decomposed U-Net: a plain loop that puts every tile of an image on its GPU by hand.

    python train.py --gpus 4 --dataset synthetic          # four tiles with a communication network
    python train.py --comm-channels 0                     # the same tiles, which know nothing of each other
    python train.py --grid 1x1 --comm-channels 0          # the plain U-Net on the whole image
    python train.py --dataset folder --data DIR           # your own images and masks, see docs/own-images.md
    python train.py --resume runs/NAME                    # go on after the last completed epoch
    torchrun --nproc-per-node 2 train.py --gpus 2         # in two processes of two GPUs each, with half of every batch

Every run leaves a folder with metrics.json, log.csv, best.pt, last.pt, curves.png and predictions.png.

Read it from top to bottom: where each tile lives, the loss, a training step, an epoch, validation,
and `train`, which puts them together. Options, files, resuming and many processes are in support/:
where there is one process, what begins with `processes.` leaves things as they are.

`config` holds all options under their names (python train.py --help), and what was found in the images:
channels, dtype (as they are stored), classes, colors, mean and std (of each channel), image_size (which
--grid cuts) and loss_weights (of each class, or None). Letters as in decompose.py.
"""

import itertools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

from support.options import Progress, UserError, one_line_errors, train_parser

if __name__ == "__main__" and "--help" in sys.argv:
    train_parser().parse_args()  # answers before PyTorch is loaded, which takes seconds

import numpy as np
import torch
from torch import Tensor, nn

from decompose import DecomposedUNet, Tiling, learns_statistics
from support import processes, scale
from support.datasets import build_datasets
from support.images import normalise
from support.loaders import make_loaders, start
from support.loss import IGNORE, SUMS, loss_from_sums, loss_sums
from support.model import build_from_config
from support.plots import downsampling
from support.run import Run, prepare_run
from support.scores import confusion, pixels_near_seam, scores
from support.sizes import build_tiling


# Where each tile lives

def place(tiling: Tiling, devices: list) -> dict[int, torch.device]:
    """The device of each tile of this process. Tiles take turns: of four tiles on two GPUs, tiles 0 and 2 live on the
    first, 1 and 3 on the second."""
    placement = {}
    for number, i in enumerate(processes.own_tiles(len(tiling))):
        placement[i] = devices[number % len(devices)]
    return placement


def to_device(tile: Tensor, device: torch.device) -> Tensor:
    """A tile on its device. Copies to a GPU go through pinned memory, so that the loop need not wait
    for one GPU before it gives work to the next."""
    if device.type == "cuda" and tile.device.type == "cpu":
        pinned = torch.empty_like(tile, pin_memory=True)  # in the tile's own order, so this is the only copy
        return pinned.copy_(tile).to(device, non_blocking=True)
    return tile.to(device)


def run_tiles(model: DecomposedUNet, images: Tensor, tiling: Tiling, devices: list, config: dict,
              reduce_tile: Callable) -> list:
    """Images (B,C,H,W) as they are stored -> what reduce_tile(i, logits) returns for each tile i, on its device."""
    image_tiles = tiling.split(images)
    placement = place(tiling, devices)

    def load_tile(i: int) -> Tensor:
        tile = to_device(image_tiles[i], placement[i])
        return normalise(tile, config["mean"], config["std"])

    # In bfloat16 where the user wants it. Without the cache, each tile has its own bfloat16 copy of the weights, and
    # the gradients of all tiles are added up in float32. In bfloat16, in which the cache would add them up, small ones
    # are lost.
    device_type = devices[0].type
    with torch.autocast(device_type, torch.bfloat16, enabled=config["amp"], cache_enabled=False):
        recompute = config["recompute"]
        stack = scale.can_stack(model) and not recompute
        if recompute or stack or len(placement) < len(tiling):
            groups = scale.group_tiles(tiling, placement, images.shape[0], stack)
            return scale.forward(model, tiling, groups, devices, load_tile, reduce_tile, recompute)
        tiles = []
        for i in range(len(tiling)):
            tiles.append(load_tile(i))
        reduced = []
        for i, logits in enumerate(model(tiles, tiling)):
            reduced.append(reduce_tile(i, logits))
        return reduced


# The loss

def batch_loss(model: DecomposedUNet, images: Tensor, masks: Tensor, tiling: Tiling, devices: list,
               config: dict) -> Tensor:
    """Images (B,C,H,W), masks (B,H,W) -> the loss, on the first device. Of the logits of a tile, only the sums for
    the loss travel."""
    mask_tiles = tiling.split(masks, overlap=False, fill=IGNORE)

    def sums_of_tile(i: int, logits: Tensor) -> Tensor:
        mask = to_device(mask_tiles[i], logits.device)
        return loss_sums(logits, mask)

    total = 0
    for sums in run_tiles(model, images, tiling, devices, config, sums_of_tile):
        total = total + sums.to(devices[0])
    return loss_from_sums(processes.all_reduce_sum(total), config["loss_weights"])


# A training step

def train_step(model, images: Tensor, masks: Tensor, optimizer, schedule, config: dict, devices: list) -> Tensor:
    """Changes the weights once. Returns the loss of the batch. Shapes as in batch_loss."""
    optimizer.zero_grad()  # before the forward pass, or the old gradients would lie beside all activations
    tiling = build_tiling(config, images.shape[-2:])
    loss = batch_loss(model, images, masks, tiling, devices, config)
    loss.backward()
    processes.synchronise(model, len(tiling))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    return loss.detach()


def freeze_step_of(config: dict, steps: int) -> int:
    """The step from which on batch norm is frozen, of so many steps: see set_training_mode.

    By default after 0.3 of them, where the learning rate is at its peak, but at the earliest after
    300 steps; and where that is more than half of all, after half of them. Of 600 steps, as in the
    first command of the README, it is step 300. At least one step learns statistics.
    """
    part = config["freeze_batch_norm"]
    if part is None:
        return max(round(0.3 * steps), min(300, steps // 2), 1)
    return max(round(part * steps), 1)


def set_training_mode(model: nn.Module, frozen: bool):
    """Puts the network into training mode. frozen: batch norm alone is put into evaluation mode, in
    which it uses its running statistics and does not change them. Its scale and shift go on learning.

    Until it is frozen, every tile is normalised by its own statistics, and in evaluation by the
    running statistics. Where a step sees few images the two differ, and a network that was trained
    with the first alone fails with the second. Source of the idea: Wu, Johnson, "Rethinking 'Batch'
    in BatchNorm" (arXiv 2105.07576).
    """
    model.train()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.train(not frozen)


def train_epoch(model, loader, optimizer, schedule, config: dict, devices: list, freeze_step: int) -> float:
    """One pass over the training images. Returns the mean loss. UserError: a loss is nan or infinite.

    freeze_step: the step, counted from 0 over all epochs, from which on batch norm is frozen.
    """
    progress = Progress("step", schedule.total_steps, schedule.last_epoch)
    losses = []
    for images, masks in start(loader):
        step = schedule.last_epoch  # PyTorch's name for the number of steps that the schedule has made
        set_training_mode(model, frozen=step >= freeze_step)
        loss = train_step(model, images, masks, optimizer, schedule, config, devices)
        losses.append(loss)
        if len(losses) % 50 == 0 or len(losses) == len(loader):  # seldom, because reading a loss waits for the GPUs
            if not math.isfinite(loss):
                raise UserError(f"the loss became {loss.item()} by step {step + 1} of {schedule.total_steps}; take a "
                                "smaller --lr")
        progress.show(step + 1, loss)
    return torch.stack(losses).mean().item()


# Validation

@torch.no_grad()
def evaluate(model, loader, config: dict, devices: list) -> dict:
    """Loss and IoU of a split. They are taken over all its pixels at once, and not averaged over images."""
    model.eval()
    classes = len(config["classes"])
    first = devices[0]
    sums = torch.zeros(SUMS, classes, dtype=torch.double, device=first)
    counts = torch.zeros(2, classes, classes, dtype=torch.long, device=first)
    progress = Progress("evaluating, batch", len(loader))
    for step, (images, masks) in enumerate(loader, start=1):
        tiling = build_tiling(config, images.shape[-2:])
        mask_tiles = tiling.split(masks, overlap=False, fill=IGNORE)

        def measure_tile(i: int, logits: Tensor) -> tuple[Tensor, Tensor]:
            mask = to_device(mask_tiles[i], logits.device)
            near_seam = pixels_near_seam(tiling, i, logits.device)
            predicted = logits.argmax(dim=1)
            return loss_sums(logits, mask), confusion(predicted, mask, near_seam, classes)

        larger = math.prod(tiling.size) > math.prod(config["image_size"])
        recompute = config["recompute"] or larger  # an image larger than those of training may not fit without it
        settings = {**config, "recompute": recompute}
        measured = run_tiles(model, images, tiling, devices, settings, measure_tile)
        for tile_sums, tile_counts in measured:
            sums += tile_sums.to(first)
            counts += tile_counts.to(first)
        progress.show(step)
    # In evaluation, groups of processes wait for each other only here, so one may have fewer batches than another. In
    # training all have the same number of them: see Batches in support/loaders.py.
    sums = processes.all_reduce_sum(sums)
    counts = processes.all_reduce_sum(counts)
    loss = loss_from_sums(sums, config["loss_weights"])
    result = scores(counts, config["classes"])
    result["loss"] = loss.item()
    return result


# All of it

def peak_learning_rate(config: dict) -> float:
    """--lr, or by default 0.015, and where a step has fewer than 16 images, less in proportion to their number."""
    if config["lr"] is not None:
        return config["lr"]
    return 0.015 * min(config["batch_size"] / 16, 1)


def train(config: dict, devices: list, out: Path, state: dict) -> dict:
    """Trains, writes the files of the run to the folder `out`, and returns what metrics.json holds.

    state: see Run.begin; {} for a new run. UserError: the loss is nan or infinite.
    """
    # The images
    datasets = build_datasets(config)
    loaders = make_loaders(datasets, config)
    steps_per_epoch = len(loaders["train"])
    steps = config["epochs"] * steps_per_epoch

    # The network, the same in every process
    torch.manual_seed(config["seed"])
    model = build_from_config(config).to(devices[0])
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(  # sets the learning rate; it cannot have 0 steps
        optimizer, peak_learning_rate(config), total_steps=max(steps, steps_per_epoch), anneal_strategy="linear")
    freeze_step = freeze_step_of(config, steps)
    if freeze_step < steps and learns_statistics(model):
        print(f"batch norm keeps its statistics after {freeze_step} of {steps} steps")

    # The run, which keeps what training changes and writes it to its folder
    run = Run(config, out, model, optimizer, schedule)
    run.begin(state)
    first_epoch = len(run.rows) + 1
    for epoch in range(first_epoch, config["epochs"] + 1):
        processes.seed_dropout(config["seed"], epoch)
        loaders["train"].batch_sampler.set_epoch(epoch)  # each has another order, other crops and flips
        started = time.perf_counter()
        learning_rate = schedule.get_last_lr()[0]
        loss = train_epoch(model, loaders["train"], optimizer, schedule, config, devices, freeze_step)
        train_seconds = time.perf_counter() - started
        validation = evaluate(model, loaders["val"], config, devices)
        seconds = time.perf_counter() - started
        run.end_epoch(loss, validation, learning_rate, train_seconds, seconds)

    # The best epoch on images that it has never seen
    if config["epochs"] == 0:  # the network as it was initialised
        run.save(evaluate(model, loaders["val"], config, devices))
    run.load_best()
    metrics = {"test": evaluate(model, loaders["test"], config, devices)}
    pictures, boxes = predict_some(model, datasets["test"], config, devices)
    return run.finish(metrics, pictures, boxes, devices)


@torch.no_grad()
def predict_some(model, dataset, config: dict, devices: list) -> tuple[dict, list]:
    """The first four images of a data set, their true masks and their predictions, reduced to the size
    of a picture; and the boxes of the tiles in these pictures."""
    model.eval()
    config = {**config, "recompute": True}  # one tile at a time
    pictures = {"image": [], "true mask": [], "prediction": []}
    boxes = []
    for image, mask in itertools.islice(dataset, 4):
        tiling = build_tiling(config, mask.shape)

        def predict_tile(i: int, logits: Tensor) -> Tensor:
            return logits.argmax(dim=1)[0].byte()

        tiles = run_tiles(model, image[None], tiling, devices, config, predict_tile)
        numbered = dict(zip(sorted(place(tiling, devices)), tiles))
        prediction = scale.stitch_over_processes(numbered, tiling, torch.device("cpu"))
        step = downsampling(mask.shape, longest=1024)
        shown = {"image": image, "true mask": mask, "prediction": prediction}
        for title, picture in shown.items():
            smaller = picture[..., ::step, ::step]
            pictures[title].append(smaller.clone())  # a view would keep the whole image in memory
        boxes.append(np.array(tiling.boxes) / step)
    return pictures, boxes


def main(arguments: list[str] | None = None):
    parser = train_parser()
    with one_line_errors(parser):
        processes.init_process_group()
        config, out, state = processes.broadcast_result(prepare_run, arguments, parser)
    with one_line_errors(parser, out):
        rows, columns = config["grid"]
        processes.share_images(config["image_processes"])
        devices = processes.find_devices(config["gpus"], f"{rows}x{columns} tiles")
        train(config, devices, out, state)


if __name__ == "__main__":
    main()
