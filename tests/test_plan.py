"""What plan.py predicts, against real steps of train.py on the CPU."""

from collections import Counter

import pytest
import torch
from conftest import CPU
from test_folder import make_folder
from torch.utils._pytree import tree_leaves

import plan
import train
from support.memory import LiveMemory
from support.model import build_from_config
from support.options import parse, plan_parser
from support.sizes import build_tiling

SMALL = "--width 4 --depth 1 --batch-size 1 --comm-channels 4 --image-size 128 --no-amp --out".split()
MIB = 2**20


def configuration(options: str) -> dict:
    """Of a small network. Without --gpus in the options it is on the CPU."""
    config = parse(SMALL + ["none"] + options.split(), plan_parser())
    config.update(channels=1, classes="abc", mean=[0.0], std=[1.0], dtype=None, loss_weights=None)
    return config


# Counting bytes

def test_live_memory_counts_storages_until_they_are_freed():
    old = torch.zeros(1000)
    with LiveMemory() as memory:
        memory.follow(old)
        a = torch.zeros(1000)
        b = a[:500].view(5, 100)  # a view is nothing new
        c = a + 1
        assert memory.live["cpu"] == 12_000
        del a, c
        assert memory.live["cpu"] == 8_000  # b keeps all of a
        del b
        memory.end_phase()
        torch.zeros(100)
    assert memory.phases == [{"cpu": 12_000}]
    assert memory.live["cpu"] == 4_000
    assert memory.peak["cpu"] == 4_400


# One step

class RealTraining:
    """Training steps of train.py on the CPU, with true tensors."""

    def __init__(self, config: dict, frozen: bool = False):
        self.config = config
        self.model = build_from_config(config)
        train.set_training_mode(self.model, frozen)
        self.optimizer = torch.optim.Adam(self.model.parameters(), fused=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.1, total_steps=10)
        self.images = torch.rand(1, 1, *config["image_size"])
        self.masks = torch.zeros(1, *config["image_size"], dtype=torch.uint8)

    def step(self):
        train.train_step(self.model, self.images, self.masks, self.optimizer, self.schedule, self.config, [CPU])

    def peak_of_second_step(self) -> int:
        """Bytes of the tensors alive, those included that were there before: also the gradients of the first step."""
        self.step()
        before = [self.model.state_dict(), self.optimizer.state_dict()["state"], self.images, self.masks]
        before += [weight.grad for weight in self.model.parameters()]
        with LiveMemory() as memory:
            for tensor in tree_leaves(before):
                memory.follow(tensor)
            del before, tensor
            self.step()
        return memory.peak["cpu"]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("options", [
    "--grid 1x1 --comm-channels 0",
    "--grid 1x3",
    "--grid 2x2 --recompute",
    "--depth 2 --grid 3x1 --overlap 8 --recompute --dropout 0.1",
    "--grid 2x2 --amp",
])
def test_the_prediction_is_a_real_step_within_two_percent(options, frozen):
    config = configuration(options)
    peak, _ = plan.predict(config, frozen)
    assert peak["cpu:1"] == pytest.approx(RealTraining(config, frozen).peak_of_second_step(), rel=0.02)


def test_images_that_are_stored_in_8_bits_take_a_quarter():
    config = configuration("--gpus 1 --grid 1x1")
    floats = plan.fake_step(config).moved["cpu", "cpu:1"]
    bytes_only = plan.fake_step({**config, "dtype": "uint8"}).moved["cpu", "cpu:1"]
    pixels = 128 * 128
    assert floats == (4 + 1) * pixels  # and the mask
    assert bytes_only == (1 + 1) * pixels


# Any number of tiles

@pytest.mark.parametrize("options, at_most", [
    ("--gpus 2 --grid 3x3 --image-size 96", 1.01),  # five tiles and four
    ("--gpus 4 --grid 5x4 --image-size 160x128 --depth 2", 1.01),  # the second GPU stands for the last two
    ("--gpus 8 --grid 6x6 --image-size 192 --depth 2 --recompute", 1.01),
    ("--gpus 1 --grid 6x2 --image-size 192x64 --depth 2 --amp", 1.02),
    ("--gpus 1 --grid 3x3 --image-size 384 --depth 3 --overlap 16 --recompute", 1.08),  # each as large as the largest
    ("--gpus 3 --grid 6x6 --image-size 192 --depth 2 --image-processes 3", 1.02),
])
def test_with_many_tiles_all_numbers_go_up_in_a_straight_line(options, at_most):
    """Against a step in which all tiles are really there."""
    config = configuration(options)
    tiling = build_tiling(config, config["image_size"])
    with plan.first_process(config["image_processes"]):
        *phases, moved = plan.predict_many_tiles(config, False, tiling)
        true = plan.fake_step(config)
    for device in phases[0]:
        largest = max(phase[device] for phase in true.phases)
        predicted = max(phase[device] for phase in phases)
        assert device == "cpu" or 0.98 * largest <= predicted <= at_most * largest
    for way, size in moved.items():
        if config["overlap"] == 0:
            assert size == pytest.approx(true.moved[way], rel=0.02)


def peak_of_tiles(tiles: int, options: str) -> int:
    """Bytes on the only GPU, for a row of tiles of 64x64 pixels."""
    return plan.fullest_gpu(configuration(f"--gpus 1 --grid 1x{tiles} --image-size 64x{64 * tiles} {options}"))


def test_with_recompute_only_the_coarse_map_grows():
    assert peak_of_tiles(4, "") > 1.6 * peak_of_tiles(2, "")
    few = peak_of_tiles(2, "--recompute --comm-channels 1")
    many = peak_of_tiles(4, "--recompute --comm-channels 1")
    bytes_of_two_tiles = 2 * 4 * 32 * 32  # of 1 of the 8 channels
    assert many - few < 12 * bytes_of_two_tiles  # those of every layer of the network


def test_what_two_gpus_exchange_is_weights_statistics_coarse_maps_and_sums():
    config = configuration("--gpus 2 --grid 1x2 --image-size 64x128")
    moved = plan.fake_step(config).moved
    model = build_from_config(config)
    parameters = sum(weight.nbytes for weight in [*model.encoder.parameters(), *model.decoder.parameters()])
    statistics = sum(buffer.nbytes for buffer in [*model.encoder.buffers(), *model.decoder.buffers()])
    coarse_map = 4 * (4 * 32 * 32)
    sums = 4 * 4 * 3  # of the loss, or their gradient
    # Each way go the weights or their gradients, the map, and the gradient of the map that came.
    assert moved["cpu:1", "cpu:2"] == parameters + statistics + 2 * coarse_map + sums
    assert moved["cpu:2", "cpu:1"] == parameters + statistics + 2 * coarse_map + sums


# What fits

@pytest.mark.parametrize("options, mib", [
    ("--grid 2x1 --recompute", 16),
    ("--grid 2x2 --depth 2 --overlap 8", 64),
    ("--width 8 --depth 6 --grid 1x1", 256),  # weights outweigh activations
])
def test_the_largest_image_fits_and_a_larger_one_does_not(options, mib):
    config = configuration(f"--gpus 1 {options}")
    step = 2 ** config["depth"] * config["grid"][0]
    side = plan.largest_image(config, mib * MIB)
    assert plan.fullest_gpu({**config, "image_size": (side, side)}) <= mib * MIB
    assert plan.fullest_gpu({**config, "image_size": (side + step, side + step)}) > mib * MIB


def test_tiles_of_the_largest_image_are_never_single_cells():
    config = configuration("--gpus 1 --grid 2x3 --depth 3")
    of_two_cells = plan.fullest_gpu({**config, "image_size": (2 * 48, 2 * 48)})
    assert plan.largest_image(config, of_two_cells) == 2 * 48
    assert plan.largest_image(config, of_two_cells - 1) == 0


@pytest.mark.parametrize("options, part, expected", [
    ("--grid 1x2", 0.9, "--recompute"),
    ("--grid 1x1 --batch-size 2", 0.3, "--grid 2x2 --recompute --batch-size 1"),
])
def test_what_is_said_to_fit_fits(options, part, expected):
    config = configuration(f"--gpus 1 {options}")
    limit = part * plan.fullest_gpu(config)
    said = plan.what_fits(config, limit)
    assert expected in said[0]
    for way in said:
        change, needs = way.split(" (")
        needed = plan.fullest_gpu(configuration(f"--gpus 1 {options} {change}"))  # an option's second value counts
        assert needed <= limit
        assert needs == f"{needed / 2**30:.1f} GiB)"


def test_nothing_is_said_to_fit_if_nothing_does():
    assert plan.what_fits(configuration("--gpus 1 --grid 1x1 --image-size 16"), 1000) == []


# The command

def no_image(config, memory):
    return 0


def test_the_peaks_are_told_and_whether_the_fullest_gpu_holds_the_step(monkeypatch, capsys):
    def some_memory(config):
        return Counter({plan.FIRST: 1.5 * 2**30, plan.SECOND: 2**29}), Counter({("cpu", plan.FIRST): 2**20})

    monkeypatch.setattr(plan, "predict", some_memory)
    monkeypatch.setattr(plan, "largest_image", no_image)
    plan.main("--gpus 2 --memory 3".split())
    told = capsys.readouterr().out
    assert "GPU 0: peak 1,536.0 MiB" in told
    assert "each other GPU: peak 512.0 MiB" in told
    assert "host to GPU 0: 1.0 MiB" in told
    assert "This needs more" not in told
    plan.main("--gpus 2 --memory 2".split())
    assert "This needs more. What would fit: nothing that is known here" in capsys.readouterr().out


def test_it_says_where_recompute_saves_nothing(capsys):
    plan.main(SMALL + "none --gpus 2 --grid 1x2 --recompute".split())
    assert "--recompute saves no memory" in capsys.readouterr().out
    plan.main(SMALL + "none --gpus 1 --grid 1x2 --recompute".split())
    assert "saves no memory" not in capsys.readouterr().out


def test_it_takes_a_run_and_what_is_given_beside_it_replaces_its_options(tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "run")
    train.main(SMALL + [out, "--train-images", "2", "--epochs", "0"])
    capsys.readouterr()
    monkeypatch.setattr(plan, "largest_image", no_image)
    plan.main(["--run", out, "--memory", "8"])
    assert "4 tiles, batch 1:" in capsys.readouterr().out
    plan.main(["--run", out, "--gpus", "3", "--grid", "3x2", "--amp"])
    told = capsys.readouterr().out
    assert "6 tiles, batch 1, bfloat16:" in told
    assert "each other GPU: peak" in told
    with pytest.raises(SystemExit, match="2"):
        plan.main(["--run", out, "--channels", "4"])
    assert "--run takes the options of the run; beside it can only stand --memory" in capsys.readouterr().err


def test_who_runs_out_of_memory_is_told_whom_to_ask(tmp_path, monkeypatch, capsys):
    def no_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "train_epoch", no_memory)
    with pytest.raises(SystemExit, match="2"):
        train.main(SMALL + [str(tmp_path / "run"), "--train-images", "2"])
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "out of memory; take fewer --workers, or ask plan.py what would fit" in said


def test_more_gpus_are_proposed_only_as_far_as_each_process_has_tiles_for_them(monkeypatch):
    def of_gpus(config):
        return 0 if config["gpus"] > 1 else 2

    monkeypatch.setattr(plan, "fullest_gpu", of_gpus)
    config = configuration("--gpus 1 --grid 2x4 --image-processes 4")
    assert plan.what_fits(config, 1) == ["--gpus 2 (0.0 GiB)"]


def test_of_a_folder_it_takes_size_channels_and_type_from_the_first_image(tmp_path, capsys):
    make_folder(tmp_path / "data", 4, size=(256, 512), classes=2)
    plan.main(["--dataset", "folder", "--data", str(tmp_path / "data"), "--gpus", "1", "--grid", "1x1"])
    told = capsys.readouterr().out
    assert "1 tiles, batch 2" in told  # two of the four images stand in for val and test
    assert "host to GPU 0: 1.0 MiB" in told  # 2 * 256 * 512 pixels of three channels and a mask, in 8 bits
