"""Train a domain-decomposed U-Net: tile i of every image is computed on cuda:(i mod gpus), or all on the CPU.

    python train.py --gpus 4 --dataset synthetic          # four tiles with a communication network
    python train.py --comm-channels 0                     # the same tiles, which know nothing of each other
    python train.py --grid 1x1 --comm-channels 0          # the plain U-Net on the whole image

Every run leaves a folder: metrics.json, log.csv, best.pt, last.pt, curves.png, predictions.png.
Read from top to bottom: what is measured, what is built, how it is trained, what is written. What can be asked for
stands in options.py.
Letters (B, C, H, W, K, D, L, ...) as in decompose.py.
"""

import csv
import json
import os
import resource
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

import plots
from comm_net import CommNet
from decompose import DecomposedUNet, Tiling
from options import build_tiling, make_parser, parse
from synthetic import LinesAndCircles
from unet import Decoder, Encoder

IGNORE = 255  # mask value of pixels that are neither learned nor scored


# What is measured. Each tile yields a few sums where it was computed; only these travel, never a mask.

def loss_sums(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits (B,L,h,w), mask (B,h,w) -> (2L+2,) float32: per class, the intersection and the cardinality
    (predicted plus true) for Dice; the sum of the cross-entropy; the number of pixels that count."""
    log_p = logits.float().log_softmax(dim=1)
    counts = (mask != IGNORE).unsqueeze(1)
    truth = torch.zeros_like(log_p).scatter_(1, mask.long().unsqueeze(1).where(counts, 0), counts.float())
    p = log_p.exp() * counts
    pixels = (0, 2, 3)
    return torch.cat([(p * truth).sum(pixels), p.sum(pixels) + truth.sum(pixels),
                      -(log_p * truth).sum().unsqueeze(0), counts.sum().float().unsqueeze(0)])


def dice_cross_entropy(sums: Tensor) -> Tensor:
    """The sums of all tiles -> (1 - mean Dice over classes) + mean cross-entropy. The Dice of a class is
    (2 * intersection + 1) / (cardinality + 1), so a class that is neither there nor predicted scores 1."""
    (intersection, cardinality), (cross_entropy, pixels) = sums[:-2].chunk(2), sums[-2:]
    dice = (2 * intersection + 1) / (cardinality + 1)
    return 1 - dice.mean() + cross_entropy / pixels.clamp(min=1)


def confusion(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits (B,L,h,w), mask (B,h,w) -> (L,L) counts of pixels: true class by predicted class."""
    classes = logits.shape[1]
    pairs = (mask.long() * classes + logits.argmax(dim=1)).where(mask != IGNORE, classes**2).flatten()
    counts = torch.zeros(classes**2 + 1, dtype=torch.long, device=logits.device)
    counts.scatter_add_(0, pairs, torch.ones_like(pairs))  # bincount would make the loop wait for each GPU in turn
    return counts[:-1].view(classes, classes)


def iou(counts: Tensor) -> Tensor:
    """(L,L) counts -> intersection over union of each class, nan for a class neither true nor predicted."""
    counts = counts.double()
    intersection = counts.diagonal()
    return intersection / (counts.sum(dim=0) + counts.sum(dim=1) - intersection)


# What is built

def build_model(config: dict) -> DecomposedUNet:
    """The network that a configuration describes, as `best.pt` and `last.pt` hold it under "config"."""
    width, depth, dropout, k = config["width"], config["depth"], config["dropout"], config["comm_channels"]
    return DecomposedUNet(Encoder(config["channels"], width, depth, dropout),
                          Decoder(len(config["classes"]), width, depth, dropout),
                          CommNet(k, dropout, config["dilations"]) if k else None, k, config["recompute"])


def build_datasets(config: dict) -> dict[str, LinesAndCircles]:
    """Train, val and test; val and test have an eighth of the training images each. The discs are kept apart by tiles
    of about 32x32 pixels whatever the network's grid, so that all models see the same images."""
    count, size = config["train_images"], config["image_size"]
    lengths = {"train": count, "val": max(count // 8, 1), "test": max(count // 8, 1)}
    grid = tuple(max(pixels // 32, 1) for pixels in size)
    return {split: LinesAndCircles(length, size, grid, split, config["seed"]) for split, length in lengths.items()}


# How it is trained

def run_tiles(model, images: Tensor, masks: Tensor, tiling: Tiling, devices: list, measure) -> list:
    """images (B,C,H,W), masks (B,H,W) -> measure(logits, mask) of every tile, computed on the tile's device."""
    placement = [devices[i % len(devices)] for i in range(len(tiling))]  # tile i lives on cuda:(i mod gpus)
    tiles, mask_tiles = tiling.split(images), tiling.split(masks, overlap=False, fill=IGNORE)

    def finish(i, logits):
        return measure(logits, mask_tiles[i].to(placement[i], non_blocking=True))

    return model(tiles, tiling, placement, finish)


def train_epoch(model, loader, tiling: Tiling, devices: list, optimizer, schedule) -> float:
    """One pass over the training images. Returns the mean loss."""
    model.train()
    total = 0
    for step, (images, masks) in enumerate(loader, start=1):
        sums = run_tiles(model, images, masks, tiling, devices, loss_sums)
        loss = dice_cross_entropy(sum(s.to(devices[0]) for s in sums))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.detach()
        show_progress(f"step {step} of {len(loader)}")
    return total.item() / len(loader)


@torch.no_grad()
def evaluate(model, loader, tiling: Tiling, devices: list) -> dict:
    """Loss and IoU of a split, taken over all its pixels at once and not averaged over images."""
    model.eval()
    sums, counts = 0, 0
    for images, masks in loader:
        def measure(logits, mask):
            return loss_sums(logits, mask), confusion(logits, mask)

        for tile_sums, tile_counts in run_tiles(model, images, masks, tiling, devices, measure):
            sums, counts = sums + tile_sums.to(devices[0]).double(), counts + tile_counts.to(devices[0])
    scores = iou(counts)
    return {"loss": dice_cross_entropy(sums).item(), "mean_iou": scores.nanmean().item(),
            "iou": dict(zip(loader.dataset.classes, scores.tolist()))}


@torch.no_grad()
def predict_some(model, dataset, tiling: Tiling, devices: list, count: int = 4) -> dict[str, Tensor]:
    """The first images of a data set, their masks, and the masks that the model predicts."""
    images, masks = map(torch.stack, zip(*(dataset[i] for i in range(min(count, len(dataset))))))
    tiles = run_tiles(model.eval(), images, masks, tiling, devices, lambda logits, _: logits.argmax(dim=1).cpu())
    return {"image": images, "true mask": masks, "prediction": tiling.stitch(tiles)}


def train(config: dict, devices: list, out: Path) -> dict:
    """Trains, writes the files of the run to the folder `out`, and returns what metrics.json holds."""
    started = time.perf_counter()
    torch.manual_seed(config["seed"])
    datasets, tiling = build_datasets(config), build_tiling(config)
    model = build_model(config).to(devices[0])
    shuffled = torch.Generator().manual_seed(config["seed"])
    loaders = {split: DataLoader(data, config["batch_size"], shuffle=split == "train", generator=shuffled,
                                 pin_memory=devices[0].type == "cuda") for split, data in datasets.items()}
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    steps = len(loaders["train"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config["lr"], config["epochs"] * steps,
                                                   anneal_strategy="linear")

    rows, best = [], None
    names = "".join(f"  IoU {name}" for name in config["classes"])
    print(f"epoch  train loss  val loss{names}  mean IoU  seconds")
    for epoch in range(1, config["epochs"] + 1):
        begun, lr = time.perf_counter(), schedule.get_last_lr()[0]
        loss = train_epoch(model, loaders["train"], tiling, devices, optimizer, schedule)
        trained = time.perf_counter()
        val = evaluate(model, loaders["val"], tiling, devices)
        if best is None or val["mean_iou"] > best["mean_iou"]:
            best = val
            save_checkpoint(out / "best.pt", config, model)
        save_checkpoint(out / "last.pt", config, model)
        rows.append({"epoch": epoch, "train_loss": loss, "val_loss": val["loss"],
                     **{f"val_iou_{name}": score for name, score in val["iou"].items()},
                     "val_mean_iou": val["mean_iou"], "learning_rate": lr,
                     "train_seconds": trained - begun, "seconds": time.perf_counter() - begun})
        write_log(out / "log.csv", rows)
        show_progress("")
        print(f"{epoch:5}  {loss:10.4f}  {val['loss']:8.4f}"
              + "".join(f"  {score:{len(name) + 4}.4f}" for name, score in val["iou"].items())
              + f"  {val['mean_iou']:8.4f}  {rows[-1]['seconds']:7.1f}", flush=True)

    model = load_model(out / "best.pt").to(devices[0])
    test = evaluate(model, loaders["test"], tiling, devices)
    with whole_file(out / "curves.png") as unfinished:
        plots.draw_curves(unfinished, rows, config["classes"], config["colors"])
    with whole_file(out / "predictions.png") as unfinished:
        plots.draw_predictions(unfinished, predict_some(model, datasets["test"], tiling, devices), tiling.boxes,
                               config["classes"], config["colors"])
    metrics = {"config": config, "parameters": sum(weight.numel() for weight in model.parameters()),
               "seconds": time.perf_counter() - started,
               "seconds_per_step": statistics.median(row["train_seconds"] for row in rows) / steps,
               "peak_mib": peak_mib(devices), "val": best, "test": test}
    metrics = json.loads(json.dumps(metrics), parse_constant=lambda _: None)  # JSON has no nan
    with whole_file(out / "metrics.json") as unfinished:
        unfinished.write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


# What is written

@contextmanager
def whole_file(path: Path):
    """A path to write to. Only when the block ends well does it take the place of what stood at `path`."""
    unfinished = path.with_stem(path.stem + ".unfinished")
    yield unfinished
    os.replace(unfinished, path)


def save_checkpoint(path: Path, config: dict, model):
    with whole_file(path) as unfinished:
        torch.save({"config": config, "model": model.state_dict()}, unfinished)


def load_model(path: Path) -> DecomposedUNet:
    """The network of a checkpoint, on the CPU and in evaluation mode."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    model = build_model(checkpoint["config"])
    model.load_state_dict(checkpoint["model"])
    return model.eval()


def write_log(path: Path, rows: list[dict]):
    with whole_file(path) as unfinished, open(unfinished, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def peak_mib(devices: list) -> dict[str, float]:
    """The allocator's peak on each GPU; without one, the process's peak resident memory (Linux counts it in KiB)."""
    if devices[0].type == "cuda":
        return {str(device): torch.cuda.max_memory_allocated(device) / 2**20 for device in devices}
    return {"cpu": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}


def show_progress(text: str):
    """On a terminal, one line that is overwritten; elsewhere nothing."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)


# The command

def find_devices(config: dict) -> list[torch.device]:
    """The GPUs asked for as far as they exist, else the CPU. Says in one line where the tiles are computed."""
    found = min(config["gpus"], torch.cuda.device_count())
    devices = [torch.device("cuda", i) for i in range(found)] or [torch.device("cpu")]
    rows, columns = config["grid"]
    short = f" ({config['gpus']} GPUs asked for, {found} found)" if found < config["gpus"] else ""
    print(f"{rows}x{columns} tiles on {', '.join(map(str, devices))}{short}")
    return devices


def main(arguments: list[str] | None = None):
    parser = make_parser("Train a domain-decomposed U-Net. Without a GPU, every tile is computed on the CPU.")
    config = parse(arguments, parser)
    try:
        data = build_datasets(config)["train"]
    except ValueError as error:
        parser.error(f"--image-size: {error}")
    config |= {"channels": data.channels, "classes": data.classes, "colors": data.colors}
    out = Path(config["out"])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {out}: {error.strerror}; name a folder that can be made")
    devices = find_devices(config)
    try:
        metrics = train(config, devices, out)
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; {out} holds what the last completed epoch left")
    print(f"\ntest IoU of the best epoch, in {metrics['seconds']:.0f} seconds:")
    for name, score in [*metrics["test"]["iou"].items(), ("mean", metrics["test"]["mean_iou"])]:
        print(f"  {name:12} {score:.4f}")
    print(f"See {out}: predictions.png, curves.png, metrics.json, log.csv, best.pt, last.pt")


if __name__ == "__main__":
    main()
