"""Several processes that share batches, images or both, against one process that has all of it."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from conftest import CONFIG, CPU, gradients_of, random_batch
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, default_collate

import plan
import train
from support import processes
from support.images import normalise
from support.loaders import Augmented, Batches
from support.loss import IGNORE, loss_from_sums, loss_sums
from support.memory import LiveMemory
from support.model import build_from_config
from support.sizes import build_tiling

try:
    from pretend_device import DEVICE, PretendDevice
except pytest.skip.Exception:
    DEVICE = None

SIZE = (52, 40)  # with 3x2 tiles in cells of 4, no two rows or columns of tiles are of one size
SMALL = {**CONFIG, "batch_size": 3, "grid": (3, 2), "image_size": SIZE, "overlap": 4}
FREEZE_AFTER = 3  # of four steps: in the second epoch
CASES = {
    "remembered": {},
    "recomputed": {"recompute": True, "dropout": 0.1},
    "without communication": {"comm_channels": 0, "overlap": 0},
}
WORLDS = {  # (processes, how many of them share an image): the cases
    (2, 2): list(CASES),
    (4, 4): ["remembered", "recomputed"],  # two of them have two of the six tiles, and two have one
    (4, 2): ["recomputed"],
    (2, 1): ["remembered", "recomputed"],
}
# Of the two processes that are measured. So wide that the weights count.
LARGE = {**SMALL, "width": 16, "batch_size": 1, "grid": (2, 2), "image_size": (64, 64), "overlap": 0, "dtype": "float32",
         "gpus": 0, "image_processes": 2}

torch.manual_seed(0)
DATA = list(zip(*random_batch(4, SIZE)))


def new_training(config: dict):
    """The same network every time, its optimizer and its schedule."""
    torch.manual_seed(0)
    model = build_from_config(config)
    optimizer = torch.optim.Adam(model.parameters())
    return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, 4, anneal_strategy="linear")


def result_of(losses: list, model, scores: dict, config: dict) -> list:
    pictures, _ = train.predict_some(model, DATA, config, [CPU], count=1)
    return [losses, scores, gradients_of(model), model.state_dict(), pictures["prediction"]]


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
        losses.append(train.train_epoch(model, loader, optimizer, schedule, config, [CPU], FREEZE_AFTER))
    images = DATA[processes.group_rank()::processes.number_of_groups()]
    scores = train.evaluate(model, DataLoader(images), config, [CPU])
    return result_of(losses, model, scores, config)


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


def measure_step(recompute: bool, devices=(CPU,)) -> dict:
    """The second step of training: its peak of bytes alive, what it hands over, and its gradients."""
    config = {**LARGE, "recompute": recompute}
    model, optimizer, schedule = new_training(config)
    images = torch.rand(1, 1, 64, 64)
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
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
    return {"peak": memory.peak["cpu"], "bytes": counted.bytes, "calls": counted.calls, "gradients": gradients_of(model)}


def measure_steps() -> dict:
    measured = {"remembered": measure_step(recompute=False), "recomputed": measure_step(recompute=True)}
    if DEVICE is not None:
        with PretendDevice():
            measured["two devices"] = measure_step(recompute=False, devices=(CPU, DEVICE))
    return measured


def ask_first() -> list:
    """What the first process finds out for all, and how it ends if that fails."""
    told = [processes.broadcast_result(int, processes.rank())]
    try:
        processes.broadcast_result(int, "no number")
    except (ValueError, SystemExit) as error:
        told.append(type(error))
    return told


def work(rank: int, folder: str):
    """Process `rank`. It is one of each of the worlds that are large enough, and leaves what came out in `folder`."""
    torch.set_num_threads(1)
    float32 = torch.Tensor.float
    for (world, shared), cases in WORLDS.items():
        if rank >= world:
            continue
        meeting = f"file://{folder}/meet-{world}-{shared}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
        processes.share_images(shared)
        if world == shared == 2:
            torch.save(measure_steps(), f"{folder}/measured-{rank}")
            torch.save(ask_first() == [0, ValueError if rank == 0 else SystemExit], f"{folder}/told-{rank}")
        torch.set_default_dtype(torch.float64)
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


def assert_same_results(folder, world: str, ranks, case: str, expected: list):
    for rank in ranks:
        result = torch.load(folder / f"{world}-{rank}-{case}")
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_processes_that_share_an_image_learn_what_one_does(case, results, in_float64):
    expected = train_and_evaluate(case)
    assert_same_results(results, "2-2", range(2), case, expected)
    if case in WORLDS[4, 4]:
        assert_same_results(results, "4-4", range(4), case, expected)


def test_two_groups_of_two_learn_what_two_processes_do(results):
    for rank in range(2):
        expected = torch.load(results / f"2-1-{rank}-recomputed")
        assert_same_results(results, "4-2", [2 * rank, 2 * rank + 1], "recomputed", expected)


# Processes that share batches

def average(models: list):
    """The running statistics of all become their mean."""
    for buffers in zip(*[model.buffers() for model in models]):
        mean = torch.stack(buffers).double().mean(dim=0)
        for buffer in buffers:
            buffer.copy_(mean)


def sums_of_share(model, batch: list[int], rank: int):
    """The sums of the loss of a process. One that is left without an image has one that does not count."""
    share = batch[rank::2]
    images, masks = default_collate([DATA[i] for i in share or batch[:1]])
    if not share:
        masks[:] = IGNORE
    tiling = build_tiling(SMALL, SIZE)
    logits = model(tiling.split(normalise(images, SMALL["mean"], SMALL["std"])), tiling)
    return loss_sums(tiling.stitch(logits), masks)


def train_by_hand() -> list:
    """Two processes in one: they have the same weights, and each its own running statistics."""
    model, optimizer, schedule = new_training(SMALL)
    not_copied = {id(weight): weight for weight in model.parameters()}
    models = [model, copy.deepcopy(model, not_copied)]
    losses = []
    batches = []
    sampler = Batches(len(DATA), SMALL["batch_size"], seed=0)
    for epoch in (1, 2):
        sampler.set_epoch(epoch)
        for batch in sampler:
            batches.append([i for _, i, _ in batch])
    for step, batch in enumerate(batches):
        sums = 0
        for rank, one in enumerate(models):
            train.set_training_mode(one, frozen=step >= FREEZE_AFTER)
            sums += sums_of_share(one, batch, rank)
        optimizer.zero_grad()
        loss = loss_from_sums(sums)
        loss.backward()
        if step < FREEZE_AFTER:
            average(models)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    of_epochs = [(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2]
    return result_of(of_epochs, model, train.evaluate(model, DataLoader(DATA), SMALL, [CPU]), SMALL)


def test_processes_that_share_batches_learn_what_one_does(results, in_float64):
    assert_same_results(results, "2-1", range(2), "remembered", train_by_hand())


# What each does, and in which order

def test_what_the_first_process_finds_is_told_to_all_and_if_it_fails_the_others_end(results):
    assert torch.load(results / "told-0")
    assert torch.load(results / "told-1")


CASE_OF_TWO_DEVICES = pytest.param("two devices", marks=pytest.mark.skipif(DEVICE is None, reason="no second device"))


@pytest.mark.parametrize("case", ["remembered", "recomputed", CASE_OF_TWO_DEVICES])
def test_all_processes_exchange_the_same_in_the_same_order_and_gradients_after_the_backward_pass(case, results):
    """Or one could wait for another that waits for it. In the backward pass there is a single exchange."""
    first = torch.load(results / "measured-0")[case]
    second = torch.load(results / "measured-1")[case]
    assert first["calls"] == second["calls"]
    coarse_map = (1, 8, 16, 16)
    exchanges = [(shape, members) for shape, members, in_backward_pass in first["calls"] if in_backward_pass]
    assert exchanges == [(coarse_map, "group")]
    weights = sum(gradient.numel() for gradient in first["gradients"])
    statistics = sum(buffer.numel() for buffer in build_from_config(LARGE).buffers() if buffer.is_floating_point())
    assert first["calls"][-2:] == [((weights,), "all", False), ((statistics,), "all", False)]


@pytest.mark.parametrize("case", [CASE_OF_TWO_DEVICES])
def test_two_devices_in_each_of_two_processes_learn_what_one_in_each_does(case, results):
    measured = torch.load(results / "measured-0")
    torch.testing.assert_close(measured[case]["gradients"], measured["remembered"]["gradients"])


# What each needs

@pytest.mark.parametrize("case, recompute", [("remembered", False), ("recomputed", True)])
def test_the_plan_of_a_process_is_what_it_needs_and_what_it_hands_over(case, recompute, results):
    config = {**LARGE, "recompute": recompute}
    with plan.first_process(config["image_processes"]):
        memory = plan.fake_step(config)
    peak = max(phase["cpu:1"] for phase in memory.phases)
    measured = torch.load(results / "measured-0")[case]
    assert peak == pytest.approx(measured["peak"], rel=0.02)
    assert memory.moved["cpu:1", "other processes"] == measured["bytes"]


def test_two_processes_need_little_more_than_half_of_the_memory_each():
    """The weights, what belongs to them, and the coarse map of the whole image are not shared."""
    shared, _ = plan.predict({**LARGE, "image_size": (256, 256)})
    alone, _ = plan.predict({**LARGE, "image_size": (256, 256), "image_processes": 1})
    assert shared["cpu:1"] < 0.55 * alone["cpu:1"]


def test_a_process_reads_only_its_own_tiles(monkeypatch):
    """Of a mapped file, which is not in memory, nothing else is read."""
    pixels = {torch.float32: 0, torch.uint8: 0}
    to_device = train.to_device

    def watched(tile, device):
        pixels[tile.dtype] += tile.numel()
        return to_device(tile, device)

    monkeypatch.setattr(train, "to_device", watched)
    monkeypatch.setattr(processes, "image_processes", 4)  # this one is the first
    config = {**LARGE, "comm_channels": 0}
    images, masks = random_batch(1, (64, 64))
    train.batch_loss(build_from_config(config).eval(), images, masks, build_tiling(config, (64, 64)), [CPU], config)
    assert pixels == {torch.float32: 32 * 32, torch.uint8: 32 * 32}
