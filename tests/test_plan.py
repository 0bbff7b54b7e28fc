from collections import Counter

import pytest
import torch
from conftest import CPU
from torch.utils._pytree import tree_leaves

import plan
import train
from support.memory import LiveMemory
from support.model import build_from_config
from support.options import make_parser, parse
from support.sizes import build_tiling

SMALL = "--width 4 --depth 1 --batch-size 1 --comm-channels 4 --image-size 128 --no-amp --out".split()
MIB = 2**20


def configuration(options: str) -> dict:
    """Of a small network. Without --gpus in the options it is on the CPU."""
    config = parse(SMALL + ["none"] + options.split(), make_parser(""), gpus=0)
    config.update(channels=1, classes="abc", mean=[0.0], std=[1.0])
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
        torch.zeros(100)
    assert memory.live["cpu"] == 4_000
    assert memory.peak["cpu"] == 12_000


# One step

class RealTraining:
    """Training steps on the CPU with true tensors."""

    def __init__(self, config: dict):
        self.config = config
        self.tiling = build_tiling(config, config["image_size"])
        self.model = build_from_config(config)
        self.optimizer = torch.optim.Adam(self.model.parameters(), fused=True)
        self.images = torch.rand(1, 1, *self.tiling.size)
        self.masks = torch.zeros(1, *self.tiling.size, dtype=torch.uint8)

    def step(self):
        loss = train.batch_loss(self.model, self.images, self.masks, self.tiling, [CPU], self.config)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def peak_of_a_step(self) -> int:
        """Bytes of the tensors alive, those included that were there before."""
        self.step()  # makes Adam's averages
        averages = self.optimizer.state_dict()["state"]
        with LiveMemory() as memory:
            for tensor in tree_leaves([self.model.state_dict(), averages, self.images, self.masks]):
                memory.follow(tensor)
            self.step()
        return memory.peak["cpu"]


@pytest.mark.parametrize("options", [
    "--grid 1x1 --comm-channels 0",
    "--grid 1x3",
    "--grid 2x2 --recompute",
    "--depth 2 --grid 3x1 --overlap 8 --recompute --dropout 0.1",
    "--grid 2x2 --amp",
    "--grid 2x2 --recompute --amp",
])
def test_the_prediction_is_a_real_step_within_two_percent(options):
    config = configuration(options)
    memory, _ = plan.fake_step(config)
    measured = RealTraining(config).peak_of_a_step()
    assert memory.peak["cpu:1"] == pytest.approx(measured, rel=0.02)


def peak_of_tiles(tiles: int, options: str) -> int:
    """Bytes on the only GPU, for a row of tiles of 64x64 pixels."""
    config = configuration(f"--gpus 1 --grid 1x{tiles} --image-size 64x{64 * tiles} {options}")
    memory, _ = plan.fake_step(config)
    return memory.peak["cpu:1"]


def test_without_recompute_the_peak_grows_with_the_number_of_tiles():
    assert peak_of_tiles(5, "") > 2 * peak_of_tiles(2, "")


def test_with_recompute_the_peak_does_not_grow_with_the_number_of_tiles():
    few = peak_of_tiles(2, "--recompute --comm-channels 0")
    assert peak_of_tiles(5, "--recompute --comm-channels 0") == few


def test_with_recompute_and_communication_only_the_coarse_map_grows():
    few = peak_of_tiles(2, "--recompute --comm-channels 1")
    many = peak_of_tiles(5, "--recompute --comm-channels 1")
    cells = 3 * 32 * 32  # of three more tiles
    bytes_of_coarse_map = 4 * cells  # of 1 of its 8 channels
    assert many - few < 9 * bytes_of_coarse_map  # those of every layer of the network


def number_of_bytes(tensors) -> int:
    """Of those tensors that hold fractions."""
    total = 0
    for tensor in tensors:
        if tensor.is_floating_point():
            total += tensor.nbytes
    return total


def test_weights_of_the_classes_take_next_to_no_memory():
    config = configuration("--gpus 2 --grid 1x2 --image-size 64x128")
    plain, _ = plan.fake_step(config)
    weighted, _ = plan.fake_step({**config, "loss_weights": [0.1, 1.0, 2.0]})
    for device, peak in plain.peak.items():
        assert weighted.peak[device] - peak < 1000


def test_what_two_gpus_exchange_is_weights_statistics_coarse_maps_and_sums():
    config = configuration("--gpus 2 --grid 1x2 --image-size 64x128")
    memory, _ = plan.fake_step(config)
    model = build_from_config(config)
    halves = (model.encoder, model.decoder)
    weights = sum(number_of_bytes(half.parameters()) for half in halves)  # or their gradients
    statistics = sum(number_of_bytes(half.buffers()) for half in halves)
    counters = 8 * 6  # of the steps of batch norm
    coarse_map = 4 * (4 * 32 * 32)
    sums = 4 * 8  # of the loss, or their gradient
    # Each way goes the map, and the gradient of the map that came.
    expected = weights + counters + 2 * coarse_map + sums
    assert memory.moved["cpu:1", "cpu:2"] == expected + statistics
    assert memory.moved["cpu:2", "cpu:1"] == expected + 2 * statistics  # back in float64


def test_of_several_processes_the_one_with_most_pixels_is_told():
    config = configuration("--gpus 1 --grid 1x3 --image-size 64x192 --overlap 16 --image-processes 3")
    _, moved = plan.predict(config)
    alone, _ = plan.fake_step({**config, "image_processes": 1, "grid": (1, 1), "image_size": (64, 96), "overlap": 0,
                               "comm_channels": 0})  # the tile in the middle is as large
    assert moved["cpu", "cpu:1"] == alone.moved["cpu", "cpu:1"] - 64 * 32  # but its mask has no overlap


def test_for_each_gpu_the_process_is_told_whose_tiles_on_it_have_the_most_pixels():
    """Of four tiles in a row, those in the middle have two neighbours to overlap with: they are on
    the first GPU of process 1, and on the second GPU of process 0."""
    config = configuration("--gpus 2 --grid 1x4 --image-size 64x256 --overlap 32 --image-processes 2")
    peak, moved = plan.predict(config)
    first, _ = plan.fake_step(config, process=0)
    second, _ = plan.fake_step(config, process=1)
    assert moved["cpu", "cpu:1"] == second.moved["cpu", "cpu:1"]
    assert moved["cpu", "cpu:2"] == first.moved["cpu", "cpu:2"]
    assert peak["cpu:1"] == second.peak["cpu:1"] > first.peak["cpu:1"]
    assert peak["cpu:2"] == first.peak["cpu:2"] > second.peak["cpu:2"]


def test_of_processes_with_as_many_pixels_the_one_is_told_that_needs_most():
    """The first and the last tile of a row are smaller, and each process has one of them and another
    one: process 0 begins with the smaller, process 1 with the larger."""
    config = configuration("--gpus 1 --grid 1x4 --image-size 36x148 --overlap 8 --image-processes 2 --recompute")
    peak, _ = plan.predict(config)
    first, _ = plan.fake_step(config, process=0)
    second, _ = plan.fake_step(config, process=1)
    assert peak["cpu:1"] == second.peak["cpu:1"] > first.peak["cpu:1"]


# Any number of tiles

def test_with_many_tiles_memory_goes_up_in_a_straight_line():
    config = configuration("--gpus 2 --grid 3x3 --image-size 96")  # five tiles and four
    peak, moved = plan.predict(config)
    whole, _ = plan.fake_step(config)
    for gpu in ("cpu:1", "cpu:2"):
        assert peak[gpu] == pytest.approx(whole.peak[gpu], rel=0.02)
        assert moved["cpu", gpu] == whole.moved["cpu", gpu]


@pytest.mark.parametrize("options, at_most", [
    ("--depth 2 --grid 5x1 --image-size 160x32 --overlap 8", 1.08),
    ("--depth 1 --grid 5x1 --image-size 160x32 --overlap 16 --recompute", 1.15),
    ("--depth 2 --grid 5x3 --image-size 160x96 --overlap 4 --image-processes 3", 1.08),
])
def test_tiles_that_overlap_and_are_smaller_at_the_edge_count_for_as_much_as_they_are(options, at_most):
    config = configuration(f"--gpus 1 {options}")
    peak, _ = plan.predict(config)
    whole, _ = plan.steps_of_fullest(config)
    assert 1 <= peak["cpu:1"] / whole["cpu:1"] < at_most


@pytest.mark.parametrize("tiles, options", [
    (5, "--width 32 --comm-channels 0"),
    (5, "--depth 2 --width 32 --recompute"),
    (16, "--comm-channels 8 --recompute"),
])
def test_with_many_small_tiles_too_where_weights_and_coarse_map_weigh_as_much_as_the_activations(tiles, options):
    config = configuration(f"--gpus 1 --grid 1x{tiles} --image-size 32x{32 * tiles} {options}")
    peak, _ = plan.predict(config)
    whole, _ = plan.fake_step(config)
    assert peak["cpu:1"] == pytest.approx(whole.peak["cpu:1"], rel=0.03)


# What fits

@pytest.fixture
def predictions_are_kept(monkeypatch):
    """What has been predicted for a configuration is not predicted again."""
    predict, kept = plan.predict, {}

    def predict_once(config):
        key = repr(config)
        if key not in kept:
            kept[key] = predict(config)
        return kept[key]

    monkeypatch.setattr(plan, "predict", predict_once)


def test_the_largest_image_fits_and_a_larger_one_does_not(predictions_are_kept):
    config = configuration("--gpus 1 --grid 2x1 --recompute")
    side = plan.largest_image(config, 16 * MIB)
    larger = side + 4
    assert plan.fullest({**config, "image_size": (side, side)}) <= 16 * MIB
    assert plan.fullest({**config, "image_size": (larger, larger)}) > 16 * MIB


@pytest.mark.parametrize("power", [1.2, 2.1])  # with an overlap, it bends as with less than 2
def test_the_largest_image_is_found_where_memory_is_no_straight_line_and_tiles_are_never_single_cells(
        power, monkeypatch):
    def curved_memory(config):
        tiling = build_tiling(config, config["image_size"])
        for top, bottom, left, right in tiling.coarse.boxes:
            assert bottom - top > 1
            assert right - left > 1
        side, _ = tiling.size
        return {"cpu:1": side**power}, {}

    monkeypatch.setattr(plan, "predict", curved_memory)
    config = configuration("--depth 9 --grid 2x3 --image-size 2048")
    step = 512 * 6
    assert plan.largest_image(config, (40.1 * step) ** power) == 40 * step
    assert plan.largest_image(config, (9.9 * step) ** power) == 9 * step
    assert plan.largest_image(config, (2.1 * step) ** power) == 2 * step
    assert plan.largest_image(config, (1.9 * step) ** power) == 0


@pytest.mark.parametrize("options, part, expected", [
    ("--grid 1x2", 0.9, "--recompute"),
    ("--grid 1x1", 0.5, "--grid 2x2 --recompute"),
])
def test_what_is_said_to_fit_fits(options, part, expected, predictions_are_kept):
    options = f"--gpus 1 {options}"
    config = configuration(options)
    limit = part * plan.fullest(config)
    said = plan.what_fits(config, limit)
    assert expected in said
    for change in said:
        changed = configuration(f"{options} {change}")  # of an option that is given twice, the second counts
        assert plan.fullest(changed) <= limit


def test_what_the_host_holds_needs_no_memory_of_a_gpu(monkeypatch, capsys):
    def much_on_the_host(config):
        return Counter({"cpu": 100 * 2**30, "cpu:1": 2**30}), Counter()

    monkeypatch.setattr(plan, "predict", much_on_the_host)
    monkeypatch.setattr(plan, "largest_image", lambda config, memory: 64)
    plan.main(["--gpus", "1", "--memory", "2"])
    assert "This needs more" not in capsys.readouterr().out
    plan.main(["--gpus", "1", "--memory", "0.9"])
    assert "This needs more than 0.9 GiB. What would fit: nothing that is known here" in capsys.readouterr().out


def test_nothing_is_said_to_fit_if_nothing_does(monkeypatch):
    def too_much(config):
        return {"cpu:1": 1001}, {}

    monkeypatch.setattr(plan, "predict", too_much)
    config = configuration("--gpus 1 --grid 2x2")
    assert plan.what_fits(config, 1000) == []


# The command

def test_every_gpu_and_every_model_is_told(monkeypatch, capsys):
    def steps_that_fit(config, memory):
        return int(memory / plan.fullest(config))

    monkeypatch.setattr(plan, "largest_image", steps_that_fit)  # instead of a search for the largest image
    plan.main(SMALL + "none --gpus 2 --grid 1x2 --memory 1".split())
    told = capsys.readouterr().out
    assert "2 tiles" in told
    assert "GPU 0: peak" in told
    assert "GPU 1: peak" in told
    sides = []
    for line in told.splitlines():
        if " x " in line:
            sides.append(int(line.split(" x ")[1]))
    assert len(sides) == 3
    assert sides[0] < sides[1] < sides[2]


@pytest.fixture
def said_when_out_of_memory(tmp_path, monkeypatch, capsys) -> str:
    """What train.py prints when a step does not fit."""
    def no_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "train_epoch", no_memory)
    with pytest.raises(SystemExit, match="2"):
        train.main(SMALL + [str(tmp_path / "run"), "--train-images", "2"])
    return capsys.readouterr().err


def words_after_plan(said: str) -> list[str]:
    """The options of plan.py in what train.py prints."""
    _, command = said.split("plan.py ")
    return command.split()


def test_who_runs_out_of_memory_is_told_in_one_line_whom_to_ask(said_when_out_of_memory):
    assert said_when_out_of_memory.count("\n") == 1
    assert "out of memory; this tells what would fit: python plan.py --run" in said_when_out_of_memory


def test_plan_understands_what_train_says(said_when_out_of_memory, monkeypatch, capsys):
    def no_image(config, memory):
        return 0

    monkeypatch.setattr(plan, "largest_image", no_image)
    plan.main(words_after_plan(said_when_out_of_memory))
    told = capsys.readouterr().out
    assert "4 tiles, batch 1:" in told
    assert "This needs more" not in told


def test_plan_tells_what_would_fit(said_when_out_of_memory, monkeypatch, capsys):
    def only_recompute_fits(config):
        needed = 2**29 if config["recompute"] else 2**40
        return {"cpu:1": needed}, Counter()

    def no_image(config, memory):
        return 0

    monkeypatch.setattr(plan, "predict", only_recompute_fits)
    monkeypatch.setattr(plan, "largest_image", no_image)
    *run, memory = words_after_plan(said_when_out_of_memory)
    plan.main(run + ["1"])
    assert "This needs more than 1 GiB. What would fit: --recompute or " in capsys.readouterr().out


def test_more_gpus_are_proposed_only_as_far_as_each_process_has_tiles_for_them():
    config = {"grid": (2, 4), "gpus": 1, "image_processes": 4, "recompute": True, "batch_size": 1}
    options = [options for options, _ in plan.changes_that_save_memory(config)]
    assert [option for option in options if option.startswith("--gpus")] == ["--gpus 2"]


@pytest.mark.parametrize("options", ["--data here", "--dataset folder --data here --crop 64"])
def test_it_looks_at_no_images(options, capsys):
    with pytest.raises(SystemExit, match="2"):
        plan.main(options.split())
    said = capsys.readouterr().err
    assert "error: plan.py looks at no images: give --image-size, --channels and --classes" in said


def test_with_a_run_no_other_option_of_the_step_is_passed_over(capsys):
    with pytest.raises(SystemExit, match="2"):
        plan.main(["--run", "runs/NAME", "--batch-size=64"])
    assert "--run takes the options of the run; leave --batch-size out" in capsys.readouterr().err
