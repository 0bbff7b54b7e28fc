"""Several processes that share batches, images or both, against one process that has all of it."""

import functools

import pytest
import torch
import torch.distributed as dist
from conftest import CONFIG, CPU, gradients_of, random_batch, training_step
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

import plan
import train
from decompose import Tiling
from support import processes
from support.loaders import Augmented, Batches
from support.memory import LiveMemory
from support.model import build_from_config

try:
    from pretend_device import DEVICE, PretendDevice
except pytest.skip.Exception:
    DEVICE = None

SIZE = (52, 40)  # with 3x2 tiles in cells of 4, no two rows or columns of tiles are of one size
SMALL = {**CONFIG, "batch_size": 3, "grid": (3, 2), "image_size": SIZE, "overlap": 4,
         "freeze_step": 3}  # the last of four steps
CASES = {
    "remembered": {},
    "recomputed": {"recompute": True, "dropout": 0.1},
    "without communication": {"comm_channels": 0, "overlap": 0},
    "frozen": {"freeze_step": 0},
}
WORLDS = {  # (processes, how many of them share an image): the cases
    (2, 2): list(CASES),
    (4, 4): ["remembered", "recomputed"],  # two of them have two of the six tiles, and two have one
    (4, 2): ["recomputed"],
    (2, 1): ["frozen", "recomputed"],
}
# Of the two processes that are measured. So wide that the weights count.
LARGE = {**CONFIG, "width": 16, "batch_size": 1, "image_size": (64, 64), "dtype": "float32", "gpus": 0,
         "image_processes": 2}

torch.manual_seed(0)
DATA = list(zip(*random_batch(4, SIZE)))


def new_training(config: dict):
    """The same network every time, its optimizer and its schedule."""
    torch.manual_seed(0)
    model = build_from_config(config)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=4)
    return model, optimizer, schedule


def train_and_evaluate(case: str) -> list:
    """Two epochs and an evaluation, with what train.py uses."""
    config = {**SMALL, **CASES[case]}
    model, optimizer, schedule = new_training(config)
    batches = Batches(len(DATA), SMALL["batch_size"], seed=0)  # the last has too few images for two groups
    images = Augmented(DATA, [1] * len(DATA), crop=None, augment=False, seed=0)
    loader = DataLoader(images, batch_sampler=batches)
    losses = []
    for epoch in (1, 2):
        batches.set_epoch(epoch)
        processes.seed_dropout(0, epoch)
        loss = train.train_epoch(model, loader, optimizer, schedule, config, [CPU], config["freeze_step"])
        losses.append(loss)
    own_images = DATA[processes.group_rank()::processes.number_of_groups()]
    scores = train.evaluate(model, DataLoader(own_images), config, [CPU])
    pictures, _ = train.predict_some(model, DATA, config, [CPU])
    return [losses, scores, gradients_of(model), model.state_dict(), pictures["prediction"]]


class AllReduce:
    """Does what torch.distributed.all_reduce does, and notes every call of it."""

    def __init__(self):
        self.all_reduce = dist.all_reduce
        self.calls = []
        self.bytes = 0

    def __call__(self, tensor, group=None):
        in_backward_pass = torch._C._current_graph_task_id() != -1
        members = "all" if group is None else "group"
        self.calls.append((tuple(tensor.shape), members, in_backward_pass))
        self.bytes += tensor.nbytes
        return self.all_reduce(tensor, group=group)


def measure_step(devices=(CPU,), **changes) -> dict:
    """The second step of training: its peak of bytes alive, what it hands over, and its gradients."""
    config = {**LARGE, **changes}
    model, optimizer, schedule = new_training(config)
    images, masks = random_batch(1, LARGE["image_size"])
    step = functools.partial(train.train_step, model, images, masks, optimizer, schedule, config, devices)
    step()  # makes Adam's averages
    counted = AllReduce()
    dist.all_reduce = counted
    with LiveMemory() as memory:
        averages = optimizer.state_dict()["state"]
        for tensor in tree_leaves([model.state_dict(), averages, gradients_of(model), images, masks]):
            memory.follow(tensor)
        step()
    dist.all_reduce = counted.all_reduce
    return {"peak": memory.peak["cpu"], "bytes": counted.bytes, "calls": counted.calls,
            "gradients": gradients_of(model)}


def measure_steps() -> dict:
    measured = {"remembered": measure_step(), "recomputed": measure_step(recompute=True)}
    if DEVICE is not None:
        with PretendDevice():
            measured["two devices"] = measure_step(devices=(CPU, DEVICE))
    return measured


def ask_first(question: str):
    """What the first process finds out for all, or how this one ends if that fails."""
    try:
        return processes.broadcast_result(int, question)
    except (ValueError, SystemExit) as error:
        return type(error).__name__


def compute_together() -> dict:
    """What becomes of a gradient and a statistic that are 0 in the first process, 1 in the second, and so on; and the
    rest that processes do together."""
    rank = processes.rank()
    model = torch.nn.BatchNorm2d(1)
    model.weight.grad = torch.full([1], float(rank))
    model.running_mean.fill_(rank)
    processes.synchronise(model, tiles=6)
    processes.seed_dropout(0, epoch=1)
    coarse_map = torch.arange(8.0).view(1, 2, 2, 2)
    if rank == 0:
        coarse_map = coarse_map.to(memory_format=torch.channels_last)
    return {
        "gradient": model.weight.grad.item(),
        "statistic": model.running_mean.item(),
        "drawn": torch.rand(1).item(),
        "sum": processes.sum_over_group(coarse_map).flatten().tolist(),
        "told": [ask_first("7"), ask_first("no number")],
    }


def work(rank: int, folder: str):
    """Process `rank`. It is one of each of the worlds that are large enough, and leaves what came out in `folder`."""
    torch.set_num_threads(1)
    float32 = torch.Tensor.float
    for (world, shared), cases in WORLDS.items():
        if rank >= world:
            continue
        name = f"{folder}/{world}-{shared}"
        dist.init_process_group("gloo", init_method=f"file://{name}-meet", rank=rank, world_size=world)
        processes.share_images(shared)
        if world == shared == 2:
            torch.save(measure_steps(), f"{name}-{rank}-measured")
        torch.set_default_dtype(torch.float64)
        torch.Tensor.float = torch.Tensor.double  # the sums of the loss
        torch.save(compute_together(), f"{name}-{rank}-together")
        for case in cases:
            torch.save(train_and_evaluate(case), f"{name}-{rank}-{case}")
        torch.Tensor.float = float32
        torch.set_default_dtype(torch.float32)
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the processes have left, by the names of the files."""
    folder = tmp_path_factory.mktemp("sharing")
    torch.multiprocessing.start_processes(work, (str(folder),), nprocs=4, start_method="forkserver")
    return {path.name: torch.load(path) for path in folder.glob("*-*-*-*")}


def assert_same_results(results, world: str, ranks, case: str, expected: list):
    for rank in ranks:
        found = results[f"{world}-{rank}-{case}"]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_processes_learn_what_one_does(case, results, in_float64):
    """If they share images. If they share batches, it is so once statistics are frozen: before, each process normalises
    with those of its own images."""
    expected = train_and_evaluate(case)
    for (world, shared), cases in WORLDS.items():
        if case in cases and (world == shared or case == "frozen"):
            assert_same_results(results, f"{world}-{shared}", range(world), case, expected)


def test_two_groups_of_two_learn_what_two_processes_do(results):
    assert_same_results(results, "4-2", [0, 1], "recomputed", results["2-1-0-recomputed"])
    assert_same_results(results, "4-2", [2, 3], "recomputed", results["2-1-1-recomputed"])


@pytest.mark.parametrize("world, gradient, statistic", [
    ("2-1", 1, 1 / 2),
    ("4-2", 6, (1 + 2 + 3) / 4),
    ("4-4", 6, (2 * 1 + 2 + 3) / 6),  # the first two have two of the six tiles
])
def test_gradients_are_added_up_and_statistics_are_averaged_over_tiles(world, gradient, statistic, results):
    found = results[f"{world}-0-together"]
    assert found["gradient"] == gradient
    assert found["statistic"] == pytest.approx(statistic)


def test_maps_are_added_up_pixel_by_pixel_whatever_their_order_in_memory(results):
    found = results["2-2-0-together"]
    assert found["sum"] == [0, 2, 4, 6, 8, 10, 12, 14]


def test_each_group_has_dropout_of_its_own_and_its_processes_the_same(results):
    drawn = results["4-2-0-together"]["drawn"]
    assert results["4-2-1-together"]["drawn"] == drawn
    assert results["4-2-2-together"]["drawn"] != drawn


# What each does, and in which order

def test_what_the_first_process_finds_is_told_to_all_and_if_it_fails_the_others_end(results):
    assert results["2-2-0-together"]["told"] == [7, "ValueError"]
    assert results["2-2-1-together"]["told"] == [7, "SystemExit"]


CASE_OF_TWO_DEVICES = pytest.param("two devices", marks=pytest.mark.skipif(DEVICE is None, reason="no second device"))


@pytest.mark.parametrize("case", ["remembered", "recomputed", CASE_OF_TWO_DEVICES])
def test_all_processes_exchange_the_same_in_the_same_order_and_gradients_after_the_backward_pass(case, results):
    """Or one could wait for another that waits for it. In the backward pass there is a single exchange."""
    calls = results["2-2-0-measured"][case]["calls"]
    assert results["2-2-1-measured"][case]["calls"] == calls
    coarse_map = (1, 8, 16, 16)
    sums = (4, 3)
    *in_step, (_, *gradients), (_, *statistics) = calls
    assert in_step == [(coarse_map, "group", False), (sums, "all", False), (coarse_map, "group", True)]
    assert gradients == ["all", False]
    assert statistics == ["all", False]


@pytest.mark.parametrize("case", [CASE_OF_TWO_DEVICES])
def test_two_devices_in_each_of_two_processes_learn_what_one_in_each_does(case, results):
    measured = results["2-2-0-measured"]
    torch.testing.assert_close(measured[case]["gradients"], measured["remembered"]["gradients"])


# What each needs

@pytest.mark.parametrize("case, recompute", [("remembered", False), ("recomputed", True)])
def test_the_plan_of_a_process_is_what_it_needs_and_what_it_hands_over(case, recompute, results):
    config = {**LARGE, "recompute": recompute}
    with plan.first_process(config["image_processes"]):
        memory = plan.fake_step(config)
    peak = max(phase["cpu:1"] for phase in memory.phases)
    measured = results["2-2-0-measured"][case]
    assert peak == pytest.approx(measured["peak"], rel=0.02)
    assert memory.moved["cpu:1", "other processes"] == measured["bytes"]


def test_a_process_reads_only_its_own_tiles(monkeypatch):
    """Of a mapped file, which is not in memory, nothing else is read."""
    read = []

    def watched(tile, device):
        read.append(tile.shape)
        return tile

    monkeypatch.setattr(train, "to_device", watched)
    monkeypatch.setattr(processes, "image_processes", 4)  # this one is the first
    training_step(Tiling((32, 32), (2, 2), 4), comm_channels=0)
    assert read == [(2, 1, 16, 16), (2, 16, 16)]
