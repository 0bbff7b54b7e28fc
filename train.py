"""Train a domain-decomposed U-Net: tile i of every image is computed on cuda:(i mod gpus), or all on the CPU.

    python train.py --gpus 4 --dataset synthetic          # four tiles with a communication network
    python train.py --comm-channels 0                     # the same tiles, which know nothing of each other
    python train.py --grid 1x1 --comm-channels 0          # the plain U-Net on the whole image
    python train.py --dataset folder --data DIR           # your own images and masks, see image_folder.py
    python train.py --resume runs/NAME                    # go on after the last completed epoch
    torchrun --nproc-per-node 2 train.py --gpus 2         # in two processes, each with half of every batch

Every run leaves a folder: metrics.json, log.csv, best.pt, last.pt, curves.png, predictions.png.
Read from top to bottom: what is built, how it is trained, the command (with options.py). Letters as in decompose.py.
"""

import collections
import copy
import functools
import itertools
import math
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Subset

import checkpoints
import image_folder
import plots
import processes
from checkpoints import CheckpointError
from comm_net import CommNet
from data import build_datasets, collate, describe
from decompose import DecomposedUNet, Tiling, sent
from image_folder import DataError
from metrics import IGNORE, confusion, dice_cross_entropy, loss_sums, near_seam, scores
from options import build_tiling, check_folder, explain, make_parser, parse, show_progress
from unet import Decoder, Encoder


class Diverged(ArithmeticError):
    """The loss is nan or infinite."""


# What is built

class Normalise:
    """Before the encoder: a tile as it is stored -> numbers of mean 0 and standard deviation 1 in each channel.
    Tiles travel as they are stored, which for a photograph is a quarter of the bytes."""

    def __init__(self, mean: list[float], std: list[float]):
        self.on_device = functools.cache(lambda device: torch.tensor([mean, std]).to(device)[..., None, None])

    def __call__(self, encoder: Encoder, inputs: tuple[Tensor]) -> Tensor:
        tile, (mean, std) = inputs[0], self.on_device(inputs[0].device)
        kind = next(encoder.parameters()).dtype  # with autocast bfloat16, in which 1001 - 1000 is 0
        exact = torch.promote_types(kind, torch.float32)
        x = tile.to(exact, memory_format=torch.contiguous_format) / image_folder.scale(tile)
        return ((x - mean.to(exact)) / std.to(exact)).to(kind)


def build_model(config: dict) -> DecomposedUNet:
    """The network that a configuration describes, as `best.pt` and `last.pt` hold it under "config"."""
    width, depth, dropout, k = config["width"], config["depth"], config["dropout"], config["comm_channels"]
    encoder = Encoder(config["channels"], width, depth, dropout)
    encoder.register_forward_pre_hook(Normalise(config["mean"], config["std"]))
    model = DecomposedUNet(encoder, Decoder(len(config["classes"]), width, depth, dropout),
                           CommNet(k, dropout, config["dilations"]) if k else None, k, config["recompute"])
    for weight in model.parameters():
        if weight.ndim == 4:  # convolutions are faster in this order
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    model.amp = config["amp"]
    return model


def load_model(path: Path) -> tuple[DecomposedUNet, dict]:
    """The network of a checkpoint, on the CPU and in evaluation mode, and its configuration. CheckpointError."""
    state = checkpoints.load(path)
    try:
        model = build_model(state["config"])
        model.load_state_dict(state["model"])
        [state["config"][name] for name in ("dataset", "dtype", "colors", "grid", "image_size", "overlap")]  # KeyError
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
        raise CheckpointError(f"{path}: its weights do not fit its configuration, or it comes from another "
                                          "version of train.py; name another checkpoint") from None
    return model.eval(), state["config"]


# How it is trained

def run_tiles(model, images: Tensor, tiling: Tiling, devices: list, finish) -> list:
    """images (B,C,H,W) -> finish(i, logits) of every tile i, computed on the tile's device."""
    placement = [devices[i % len(devices)] for i in range(len(tiling))]  # tile i lives on cuda:(i mod gpus)
    with torch.autocast(devices[0].type, torch.bfloat16, enabled=model.amp):  # weights and sums stay in float32
        return model(tiling.split(images), tiling, placement, finish)


def batch_loss(model, images: Tensor, masks: Tensor, tiling: Tiling, devices: list) -> Tensor:
    """images (B,C,H,W), masks (B,H,W) -> the loss, on the first device."""
    mask_tiles = tiling.split(masks, overlap=False, fill=IGNORE)

    def finish(i, logits):
        return loss_sums(logits, sent(mask_tiles[i], logits.device))

    sums = sum(sums.to(devices[0]) for sums in run_tiles(model, images, tiling, devices, finish))
    return dice_cross_entropy(processes.add(sums))


def set_training(model: nn.Module, frozen: bool):
    """Training mode. frozen: but batch norm stays in evaluation mode, so it keeps its running statistics and uses them.

    By default it is frozen in the second half of the steps. Until then every tile is normalised by its own statistics, and
    in evaluation by the running ones. Where a step sees few images the two differ, and a network that was only trained
    with the first fails with the second. The idea: Wu, Johnson, "Rethinking 'Batch' in BatchNorm" (arXiv 2105.07576).
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(not frozen)


def train_epoch(run: "Run", loader, devices: list, epoch: int) -> float:
    """One pass over the training images. Returns the mean loss. Diverged: a loss is nan or infinite."""
    steps_before = (epoch - 1) * run.steps
    set_training(run.model, frozen=steps_before > run.freeze_after)
    losses = []
    for step, (images, masks) in enumerate(loader, start=1):
        if steps_before + step - 1 == run.freeze_after:
            processes.average(run.model.buffers())  # from now on they are the same in all processes
            set_training(run.model, frozen=True)
            show_progress("")
            print(f"batch norm keeps its statistics after {run.freeze_after} of {run.config['epochs'] * run.steps} steps")
        if processes.rank() >= run.images - (step - 1) * run.config["batch_size"]:  # fewer images are left than processes
            masks = torch.full_like(masks, IGNORE)  # this one takes part in the exchange, but its image does not count
        loss = batch_loss(run.parallel, images, masks, build_tiling(run.config, images.shape[-2:]), devices)
        run.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizer.step()
        run.schedule.step()
        losses.append(loss.detach())
        if step % 50 == 0 or step == len(loader):  # seldom: to look at a loss is to wait for the GPUs
            for done, value in enumerate(torch.stack(losses).tolist(), start=1):
                if not math.isfinite(value):
                    raise Diverged(f"the loss became {value} at step {done} of epoch {epoch}")
        show_progress(f"step {step} of {len(loader)}")
    if not run.is_frozen_after(epoch):
        processes.average(run.model.buffers())
    return torch.stack(losses).mean().item()


@torch.no_grad()
def evaluate(model, loader, config: dict, devices: list) -> dict:
    """Loss and IoU of a split, taken over all its pixels at once and not averaged over images."""
    model.eval()
    classes = len(config["classes"])
    sums = torch.zeros(2 * classes + 2, dtype=torch.double, device=devices[0])
    counts = torch.zeros(2, classes, classes, dtype=torch.long, device=devices[0])
    for step, (images, masks) in enumerate(loader, start=1):
        tiling = build_tiling(config, images.shape[-2:])
        mask_tiles = tiling.split(masks, overlap=False, fill=IGNORE)

        def measure(i, logits):
            mask = sent(mask_tiles[i], logits.device)
            near = near_seam(tiling, i, logits.device)
            show_progress(f"evaluating: batch {step} of {len(loader)}, tile {i + 1} of {len(tiling)}")
            return loss_sums(logits, mask), confusion(logits.argmax(dim=1), mask, near, classes)

        for tile_sums, tile_counts in run_tiles(model, images, tiling, devices, measure):
            sums, counts = sums + tile_sums.to(devices[0]).double(), counts + tile_counts.to(devices[0])
    return {"loss": dice_cross_entropy(processes.add(sums)).item(), **scores(processes.add(counts), config["classes"])}


@torch.no_grad()
def as_trained_and_as_used(model, loader, config: dict, devices: list, frozen: bool) -> dict[str, float]:
    """The loss of some training images (16, or a batch) in training mode, and in evaluation mode. They are to be alike: a
    network is used in evaluation mode. Dropout is off in both. frozen: whether batch norm was, when it was last trained."""
    model = copy.deepcopy(model)  # training mode changes the running statistics
    losses = {"training_mode": [], "evaluation_mode": []}
    for images, masks in itertools.islice(loader, -(-16 // config["batch_size"])):
        for mode in losses:
            set_training(model, frozen or mode == "evaluation_mode")
            for module in model.modules():
                if isinstance(module, nn.Dropout2d):
                    module.eval()
            loss = batch_loss(model, images, masks, build_tiling(config, images.shape[-2:]), devices)
            losses[mode].append(loss.item())
    return {mode: statistics.mean(values) for mode, values in losses.items()}


@torch.no_grad()
def segment(model, images: Tensor, tiling: Tiling, devices: list, out: Tensor) -> Tensor:
    """images (B,C,H,W) -> out (B,H,W) uint8 on the CPU, the class of each pixel, filled tile by tile."""
    waiting = collections.deque()

    def write(i, prediction):
        top, bottom, left, right = tiling.boxes[i]
        part = out[:, top:bottom, left:right]
        part.copy_(prediction[:, :part.shape[1], :part.shape[2]])
        show_progress(f"tile {i + 1} of {len(tiling)}")

    def finish(i, logits):
        waiting.append((i, logits.argmax(dim=1).byte()))
        if len(waiting) == len(devices):  # writing waits for the device that is the next to be given a tile
            write(*waiting.popleft())

    run_tiles(model.eval(), images, tiling, devices, finish)
    for i, prediction in waiting:
        write(i, prediction)
    return out


def predict_some(model, dataset, config: dict, devices: list, count: int = 4) -> dict[str, list[Tensor]]:
    """The first images of a data set, their masks, and the masks that the model predicts."""
    images, masks = zip(*(dataset[i] for i in range(min(count, len(dataset)))))
    predictions = [segment(model, image[None], build_tiling(config, mask.shape), devices, torch.empty_like(mask)[None])[0]
                   for image, mask in zip(images, masks)]
    return {"image": images, "true mask": masks, "prediction": predictions}


class Run:
    """All that training changes: what last.pt holds, and what --resume needs to go on as if nothing had happened."""

    PARTS = "config", "rows", "best", "model", "optimizer", "schedule", "order", "random"

    def __init__(self, config: dict, images: int, device: torch.device):
        torch.manual_seed(config["seed"])
        self.config, self.images, self.rows, self.best = config, images, [], None
        self.steps = -(-images // config["batch_size"])
        self.model = build_model(config).to(device)
        self.parallel = processes.spread(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), fused=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, config["lr"], max(config["epochs"], 1) * self.steps, anneal_strategy="linear")
        self.order = torch.Generator().manual_seed(config["seed"])
        self.freeze_after = max(round(config["freeze_batch_norm"] * config["epochs"] * self.steps), 1)  # steps

    def is_frozen_after(self, epoch: int) -> bool:
        """Whether batch norm is frozen at the end of an epoch."""
        return epoch * self.steps > self.freeze_after

    def best_epoch(self) -> int:
        """The epoch whose weights best.pt holds; 0 before the first."""
        scores = [row["val_mean_iou"] for row in self.rows]
        return scores.index(self.best["mean_iou"]) + 1 if scores else 0

    def state(self) -> dict:
        return {"config": self.config, "rows": self.rows, "best": self.best, "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(),
                "order": self.order.get_state(), "random": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]}

    def restore(self, state: dict):
        """Goes back to `state`. CheckpointError: it is that of another network, or of other images."""
        total_steps = self.schedule.total_steps
        try:
            self.rows, self.best = state["rows"], state["best"]
            for part in ("model", "optimizer", "schedule"):
                getattr(self, part).load_state_dict(state[part])
            self.order.set_state(state["order"])
            torch.set_rng_state(state["random"][0])
            for gpu, numbers in zip(range(torch.cuda.device_count()), state["random"][1:]):
                torch.cuda.set_rng_state(numbers, gpu)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError):
            raise CheckpointError("last.pt: what it holds does not go together; train anew") from None
        if self.schedule.total_steps != total_steps:
            raise CheckpointError(f"the run had {self.schedule.total_steps} steps to make and would now have {total_steps}, "
                                  "so the images have changed; put them back, or train anew")


def train(config: dict, devices: list, out: Path, state: dict | None = None) -> dict:
    """Trains, writes the files of the run to the folder `out`, and returns what metrics.json holds.
    state: what last.pt held, to go on from there. Diverged: the loss is nan or infinite."""
    started, datasets = time.perf_counter(), build_datasets(config)
    run, batch, first = Run(config, len(datasets["train"]), devices[0]), config["batch_size"], processes.rank() == 0
    save, write_log = (checkpoints.save, checkpoints.write_log) if first else 2 * [lambda path, content: None]
    load = functools.partial(DataLoader, generator=run.order, collate_fn=collate)
    shuffled = BatchSampler(RandomSampler(datasets["train"], generator=run.order), batch, drop_last=False)
    loaders = {"train": load(datasets["train"], batch_sampler=processes.Shares(shuffled))}
    for split in ("val", "test"):  # images to evaluate may have several sizes
        mine = Subset(datasets[split], range(processes.rank(), len(datasets[split]), processes.count()))
        loaders[split] = load(mine, batch if config["dataset"] == "synthetic" else 1)
    if state is not None:
        run.restore(state)
        started -= sum(row["seconds"] for row in run.rows)
    else:
        save(out / "last.pt", run.state())

    print(f"epoch  train loss  val loss{''.join(f'  IoU {name}' for name in config['classes'])}  mean IoU  seconds")
    for epoch in range(len(run.rows) + 1, config["epochs"] + 1):
        begun, lr = time.perf_counter(), run.schedule.get_last_lr()[0]
        if not first:  # random numbers of its own, which need not be saved
            torch.manual_seed(hash((config["seed"], epoch, processes.rank())) % 2**63)
        loss = train_epoch(run, loaders["train"], devices, epoch)
        trained = time.perf_counter()
        val = evaluate(run.model, loaders["val"], config, devices)
        if not math.isfinite(val["loss"]):
            raise Diverged(f"the loss became {val['loss']} after step {run.steps} of epoch {epoch}")
        if run.best is None or val["mean_iou"] > run.best["mean_iou"]:
            run.best = val
            save(out / "best.pt", {"config": config, "model": run.model.state_dict()})
        run.rows.append({"epoch": epoch, "train_loss": loss, "val_loss": val["loss"],
                         **{f"val_iou_{name}": score for name, score in val["iou"].items()},
                         "val_mean_iou": val["mean_iou"], "learning_rate": lr,
                         "train_seconds": trained - begun, "seconds": time.perf_counter() - begun})
        save(out / "last.pt", run.state())
        show_progress("")
        print(f"{epoch:5}  {loss:10.4f}  {val['loss']:8.4f}"
              + "".join(f"  {score:{len(name) + 4}.4f}" for name, score in val["iou"].items())
              + f"  {val['mean_iou']:8.4f}  {run.rows[-1]['seconds']:7.1f}", flush=True)
        write_log(out / "log.csv", run.rows)

    if not config["epochs"]:  # the network as it was drawn
        run.best = evaluate(run.model, loaders["val"], config, devices)
        save(out / "best.pt", {"config": config, "model": run.model.state_dict()})
    run.model.load_state_dict(processes.from_first(lambda: checkpoints.load(out / "best.pt")["model"]))
    metrics = {"config": config, "parameters": sum(weight.numel() for weight in run.model.parameters()),
               "seconds_per_step": statistics.median([row["train_seconds"] for row in run.rows] or [math.nan]) / run.steps,
               "val": run.best, "test": evaluate(run.model, loaders["test"], config, devices),
               "loss_of_training_images": as_trained_and_as_used(
                   run.model, loaders["train"], config, devices, run.is_frozen_after(run.best_epoch()))}
    if not first:
        return metrics
    if run.rows:
        checkpoints.write_log(out / "log.csv", run.rows)  # that of a run that was stopped just before it wrote it
        with checkpoints.whole_file(out / "curves.png") as unfinished:
            plots.draw_curves(unfinished, run.rows, config["classes"], config["colors"])
    with checkpoints.whole_file(out / "predictions.png") as unfinished:
        some = predict_some(run.model, datasets["test"], config, devices)
        tilings = [build_tiling(config, mask.shape) for mask in some["true mask"]]
        plots.draw_predictions(unfinished, some, [tiling.boxes for tiling in tilings], config["classes"], config["colors"])
    metrics |= {"seconds": time.perf_counter() - started, "peak_mib": processes.peak_mib(devices)}
    checkpoints.write_json(out / "metrics.json", metrics)
    return metrics


# The command

def prepare(arguments: list[str] | None, parser) -> tuple[dict, Path, dict | None]:
    """Looks at all that is asked for and all images: the configuration, the folder of the run, and what its last.pt holds
    if it goes on. DataError, CheckpointError, and the end of the program: they do not fit together."""
    asked = config = parse(arguments, parser)
    out, state = Path(config["resume"] or config["out"]), None
    if config["resume"]:
        out = out.parent if out.is_file() else out
        if not (out / "last.pt").is_file():
            raise CheckpointError(f"--resume {out}: holds no last.pt; name the folder of a run, runs/NAME")
        state, (_, config) = checkpoints.load(out / "last.pt", Run.PARTS), load_model(out / "last.pt")
        config.setdefault("freeze_batch_norm", 1.0)  # a run that was begun before there was a choice
    if config["batch_size"] < processes.count():
        raise DataError(f"--batch-size {config['batch_size']}: {processes.count()} processes need at least as many")
    if state:
        found = describe(config, show_progress) if config["dataset"] != "synthetic" else {}
        if any(config[name] != value for name, value in found.items()):
            raise DataError(f"{config['data']}: the images are not those of the run; put them back, or train anew")
        other = [name for name in asked if name not in {"resume", "out", *found} and asked[name] != config[name]]
        if other:  # asked for by torchrun --max-restarts, where every start has all options
            raise DataError(f"--out {out}: holds a run with another {', another '.join(other)}; name another --out")
        print(f"{out}: {len(state['rows'])} of {config['epochs']} epochs are done")
    else:
        check_folder(out)  # before the long look at all images; it is made after that
        config |= describe(config, show_progress)
        out.mkdir(parents=True, exist_ok=True)
    return config, out, state


def compare_modes(loss: dict[str, float], config: dict) -> str:
    """A line that compares the loss of training images in the two modes, and names the remedy if it is much worse in use."""
    trained, used = loss["training_mode"], loss["evaluation_mode"]
    line = f"loss of training images: {trained:.4f} as trained, {used:.4f} in evaluation mode"
    if used > 1.2 * trained + 0.02:
        line += ("; they should be alike, but batch norm has not learned the statistics that it uses: take a smaller "
                 f"--freeze-batch-norm than {config['freeze_batch_norm']:g}, more --epochs, or a larger --batch-size")
    return line


def main(arguments: list[str] | None = None):
    parser = make_parser("Train a domain-decomposed U-Net. Without a GPU, every tile is computed on the CPU.")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="folder of a run to go on with after its last "
                        "completed epoch, with its options; no other option goes with it")
    out = Path()
    try:
        config, out, state = processes.from_first(lambda: prepare(arguments, parser))
        devices = processes.find_devices(config["gpus"], "{}x{} tiles".format(*config["grid"]))
        metrics = train(config, devices, out, state)
    except KeyboardInterrupt:
        go_on = f"go on with: python train.py --resume {shlex.quote(str(out))}"
        go_on = go_on if (out / "last.pt").exists() else "nothing is lost"
        parser.exit(130, None if processes.rank() else f"\nstopped; {go_on}\n")
    except (DataError, CheckpointError, Diverged) as error:
        why = (f": the likely cause is --lr {config['lr']}, take a smaller one; {out} holds what was saved before"
               if isinstance(error, Diverged) else "")
        parser.error(f"{error}{why}")
    except OSError as error:
        parser.error(explain(error, out))
    except (RuntimeError, MemoryError) as error:
        if processes.is_lost(error):
            parser.error(f"process {processes.rank()}: another one has ended, so this one stops; go on with --resume {out}")
        if not processes.is_out_of_memory(error):
            raise
        import plan  # not above: it imports this file
        parser.error(f"out of memory; plan.py says that this would fit: {plan.what_fits(config, devices)}")
    print(f"\ntest IoU of the best epoch, in {metrics.get('seconds', 0):.0f} seconds:")
    for name, score in [*metrics["test"]["iou"].items(), ("mean", metrics["test"]["mean_iou"])]:
        print(f"  {name:12} {score:.4f}")
    print(compare_modes(metrics["loss_of_training_images"], config))
    print(f"See {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


if __name__ == "__main__":
    with processes.together():
        main()
