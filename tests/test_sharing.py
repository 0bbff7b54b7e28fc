"""One image over several processes, against one process that has all of it."""

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import CONFIG, CPU
from test_plan import RealTraining, configuration
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Subset

import plan
import train
from support import processes
from support.image_folder import ImageFolder
from support.model import build_from_config
from support.sizes import build_tiling

SIZE = (52, 40)  # with 3x2 tiles in cells of 4, no two rows or columns of tiles are of one size
CASES = {
    "remembered": {"overlap": 0},
    "recomputed": {"recompute": True, "overlap": 0},
    "with an overlap": {"overlap": 4},
    "without communication": {"overlap": 0, "comm_channels": 0},
    "several sizes": {"overlap": 0, "recompute": True, "batch_size": 1},
}
WORLDS = {  # (processes, how many of them share an image): the cases
    (2, 2): list(CASES),
    (3, 3): ["remembered", "with an overlap", "several sizes"],
    (4, 4): ["recomputed", "several sizes"],
    (4, 2): ["recomputed"],
    (2, 1): ["recomputed"],
}
SHARED = [(shared, case) for world, shared in WORLDS if world == shared for case in WORLDS[world, shared]]
SHORT_RUN = "--train-images 16 --epochs 1 --batch-size 8 --width 4 --comm-channels 8 --no-amp".split()
ON_PAPER = "--depth 2 --width 16 --image-size 64 --grid 2x2"  # so wide that the weights count
PLANNED = ON_PAPER + " --image-processes 2"


class Noise(Dataset):
    """Two images of noise with masks of noise, of one size or of two."""

    def __init__(self, several_sizes: bool):
        self.sizes = [SIZE] * 2
        if several_sizes:
            self.sizes[1] = (24, 16)
        self.generator = torch.Generator()

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int):
        if i >= 2:
            raise IndexError
        self.generator.manual_seed(i)
        image = torch.randn(1, *self.sizes[i], generator=self.generator)
        mask = torch.randint(0, 3, self.sizes[i], dtype=torch.uint8, generator=self.generator)
        return image, mask


def train_and_evaluate(case: str) -> list:
    """Two epochs, with what train.py uses: the first with the statistics of the batches, the second without."""
    torch.manual_seed(0)
    config = {**CONFIG, "batch_size": 2, "grid": (3, 2), "image_size": SIZE, "dropout": 0.1, "image_processes": 4}
    config.update(CASES[case])
    data = Noise(several_sizes=case == "several sizes")
    model = build_from_config(config)
    parallel = processes.parallel(model)
    optimizer = torch.optim.Adam(model.parameters())
    batches = BatchSampler(RandomSampler(data, generator=torch.Generator().manual_seed(1)), config["batch_size"], False)
    loader = DataLoader(data, batch_sampler=processes.Shares(batches))
    steps = len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, 2 * steps, anneal_strategy="linear")
    losses = []
    statistics = []
    for epoch in (1, 2):
        if case != "several sizes":
            processes.seed(0, epoch)
        losses.append(train.train_epoch(parallel, loader, optimizer, schedule, config, [CPU], freeze_after=steps))
        statistics.append([buffer.clone() for buffer in model.buffers()])
    images = Subset(data, range(processes.group(), len(data), processes.groups()))
    scores = train.evaluate(model, DataLoader(images), config, [CPU])
    pictures, _ = train.predict_some(model, data, config, [CPU])
    gradients = [weight.grad for weight in model.parameters()]
    return [losses, statistics, scores, gradients, model.state_dict(), pictures["prediction"]]


class CountedAllReduce:
    """Does what torch.distributed.all_reduce does, and adds up the bytes that this process hands over."""

    def __init__(self):
        self.all_reduce = dist.all_reduce
        self.bytes = 0

    def __call__(self, tensor, *options, **more):
        self.bytes += tensor.nbytes
        return self.all_reduce(tensor, *options, **more)


def measure_step(recompute: bool) -> tuple[int, int]:
    """The peak bytes of tensors alive in a step of this process, and the bytes that it hands over."""
    training = SharedTraining(configuration(PLANNED + (" --recompute" if recompute else "")))
    peak = training.peak_of_a_step()
    counted = CountedAllReduce()
    dist.all_reduce = counted
    training.step()
    dist.all_reduce = counted.all_reduce
    return peak, counted.bytes


class SharedTraining(RealTraining):
    def __init__(self, config: dict):
        super().__init__(config)
        self.model = processes.parallel(self.model)
        self.model.register_comm_hook(None, allreduce_hook)  # what it does anyway, but where it can be seen


def work(rank: int, folder: str):
    """Process `rank`. It is one of each of the worlds that are large enough, and leaves what came out in `folder`."""
    torch.set_num_threads(1)
    for (world, shared), cases in WORLDS.items():
        if rank >= world:
            continue
        meeting = f"file://{folder}/meet-{world}-{shared}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
        processes.share_images(shared)
        if (world, shared) == (2, 2):
            torch.save([measure_step(False), measure_step(True)], f"{folder}/measured-{rank}")
            train.main(SHORT_RUN + ["--image-processes", "2", "--out", f"{folder}/run"])
        torch.set_default_dtype(torch.float64)
        float32 = torch.Tensor.float
        torch.Tensor.float = torch.Tensor.double  # the sums of the loss
        for case in cases:
            torch.save(train_and_evaluate(case), f"{folder}/{world}-{shared}-{rank}-{case}")
        torch.Tensor.float = float32
        torch.set_default_dtype(torch.float32)
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder of what the processes have left."""
    folder = tmp_path_factory.mktemp("sharing")
    torch.multiprocessing.start_processes(work, (str(folder),), nprocs=4, start_method="forkserver")
    return folder


@functools.cache
def expected_of(case: str) -> list:
    return train_and_evaluate(case)


@pytest.mark.parametrize("shared, case", SHARED)
def test_processes_that_share_an_image_learn_what_one_does(shared, case, results, in_float64):
    expected = expected_of(case)
    for rank in range(shared):
        result = torch.load(results / f"{shared}-{shared}-{rank}-{case}")
        torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-11)


def test_two_groups_of_two_learn_what_two_processes_do(results):
    for rank in range(4):
        result = torch.load(results / f"4-2-{rank}-recomputed")
        expected = torch.load(results / f"2-1-{rank // 2}-recomputed")
        torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-11)


def test_a_run_of_two_processes_ends_with_the_scores_of_one(results, tmp_path):
    train.main(SHORT_RUN + ["--out", str(tmp_path / "run")])
    alone = json.loads((tmp_path / "run/metrics.json").read_text())
    shared = json.loads((results / "run/metrics.json").read_text())
    for split in ("val", "test"):
        assert shared[split]["loss"] == pytest.approx(alone[split]["loss"], abs=1e-3)
        assert shared[split]["iou"] == pytest.approx(alone[split]["iou"], abs=1e-3)


# What it needs

def bytes_read(path: Path) -> int:
    """How much of a mapped file is in the memory of this process."""
    (entry,) = re.findall(rf"{re.escape(str(path))}\n(?:.*\n)*?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text())
    return 1024 * int(entry)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells which parts of a file are read")
def test_a_process_reads_only_its_own_tiles_of_a_mapped_image_and_mask(tmp_path, monkeypatch):
    np.save(tmp_path / "image.npy", np.ones((2048, 1024), np.float32))
    np.save(tmp_path / "mask.npy", np.ones((2048, 1024), np.uint8))
    image, mask = ImageFolder([(tmp_path / "image.npy", tmp_path / "mask.npy")])[0]
    config = {**CONFIG, "grid": (8, 1), "image_size": mask.shape, "width": 2, "comm_channels": 4, "overlap": 0}
    monkeypatch.setattr(processes, "image_processes", 8)  # this one is the first
    monkeypatch.setattr(processes, "sum_over_group", torch.clone)
    tiling = build_tiling(config, mask.shape)
    train.batch_loss(build_from_config(config), image[None], mask[None], tiling, [CPU], config).backward()
    # An eighth, and what the system reads ahead.
    assert image.nbytes / 8 <= bytes_read(tmp_path / "image.npy") < image.nbytes / 2
    assert mask.nbytes / 8 <= bytes_read(tmp_path / "mask.npy") < mask.nbytes


@pytest.mark.parametrize("case, options", [(0, ""), (1, " --recompute")])
def test_the_plan_of_a_process_is_what_it_needs_and_what_it_hands_over(case, options, results):
    memory, _ = plan.fake_step(configuration(PLANNED + options))
    peak, handed_over = torch.load(results / "measured-0")[case]
    assert memory.peak["cpu:1"] == pytest.approx(peak, rel=0.02)
    assert memory.moved[plan.TO_OTHERS] == handed_over


def test_two_processes_need_half_of_the_activations_each(results):
    """Beyond the images, the weights and what belongs to them. Not halved are the coarse maps, and
    what a tile needs only while it is computed."""
    config = configuration(ON_PAPER)
    alone = RealTraining(config)
    (peak, _), _ = torch.load(results / "measured-0")
    weights = sum(weight.nbytes for weight in alone.model.parameters())
    images = alone.images.nbytes + alone.masks.nbytes
    kept = images + 5 * weights  # weights, gradients, where they are added up, and two averages of Adam
    assert peak - kept < 0.55 * (alone.peak_of_a_step() - kept)
