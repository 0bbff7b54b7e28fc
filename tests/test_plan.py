from collections import Counter

import pytest
import torch
from torch.utils._pytree import tree_leaves

import plan
import train
from support.memory import LiveMemory
from support.model import build_from_config
from support.options import make_parser, parse
from support.sizes import build_tiling

SMALL = "--width 4 --depth 2 --batch-size 1 --comm-channels 4 --image-size 128 --no-amp --out none"


def test_live_memory_counts_storages_until_they_are_freed():
    old = torch.zeros(1000)
    with LiveMemory() as memory:
        memory.follow(old)
        a = torch.zeros(1000)
        b = a[:500].view(5, 100)  # a view is nothing new
        c = a + 1
        assert memory.live["cpu"] == 12_000
        del a, c
        assert memory.live["cpu"] == 8_000 and b.shape == (5, 100)
        del b
        torch.zeros(100)
    assert memory.live["cpu"] == 4_000 and memory.peak["cpu"] == 12_000


def configuration(options: str) -> dict:
    return parse([*SMALL.split(), *options.split()], make_parser("")) | {
        "gpus": 0, "channels": 1, "classes": "abc", "mean": [0.0], "std": [1.0]}


def real_step(config: dict) -> int:
    """Peak bytes of the tensors alive in a real training step on the CPU."""
    model = build_from_config(config)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    images = torch.rand(1, 1, *config["image_size"])
    masks = torch.zeros(1, *config["image_size"], dtype=torch.uint8)

    def step():
        train.batch_loss(model, images, masks, build_tiling(config, config["image_size"]), [torch.device("cpu")],
                         config).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with LiveMemory() as memory:
        for tensor in tree_leaves([model.state_dict(), optimizer.state_dict()["state"], images, masks]):
            memory.follow(tensor)
        step()
    return memory.peak["cpu"]


@pytest.mark.parametrize("options", [
    "--grid 1x1 --comm-channels 0", "--grid 1x3", "--grid 2x2 --recompute", "--grid 3x1 --overlap 8 --recompute --dropout 0.1",
    "--grid 2x2 --amp", "--grid 2x2 --recompute --amp"])
def test_the_prediction_is_a_real_step_within_two_percent(options):
    config = configuration(options)
    assert plan.fake_step(config)[0].peak["cpu:1"] == pytest.approx(real_step(config), rel=0.02)


def test_with_many_tiles_memory_goes_up_in_a_straight_line():
    config = configuration("--grid 2x5") | {"image_size": (64, 320), "gpus": 2}
    (peak, moved), (whole, _) = plan.predict(config), plan.fake_step(config)
    for gpu in ("cpu:1", "cpu:2"):
        assert peak[gpu] == pytest.approx(whole.peak[gpu], rel=0.02)
        assert moved["cpu", gpu] == whole.moved["cpu", gpu]


@pytest.mark.parametrize("tiles, options", [
    (6, "--width 16"), (6, "--width 16 --comm-channels 0"), (6, "--width 16 --recompute"),
    (16, "--depth 1 --recompute --comm-channels 8")])
def test_with_many_small_tiles_too_where_weights_and_coarse_map_weigh_as_much_as_the_activations(tiles, options):
    config = configuration(f"--grid 1x{tiles} --depth 3 {options}") | {"image_size": (32, 32 * tiles), "gpus": 1}
    peak, whole = plan.predict(config)[0], plan.fake_step(config)[0].peak
    assert peak["cpu:1"] == pytest.approx(whole["cpu:1"], rel=0.03)


def test_with_recompute_the_peak_does_not_grow_with_the_number_of_tiles():
    def peak(options, tiles):
        row = {"image_size": (64, 64 * tiles), "grid": (1, tiles), "gpus": 1}
        return plan.fake_step(configuration(options) | row)[0].peak["cpu:1"]

    assert peak("--recompute --comm-channels 0", 6) == peak("--recompute --comm-channels 0", 2)
    coarse_map = 4 * 1 * 16 * 16 * 4  # bytes of K = 1 channel (of 16) of 16x16 cells of 4 more tiles
    few, many = (peak("--recompute --comm-channels 1", tiles) for tiles in (2, 6))
    assert many - few < 9 * coarse_map  # those of every layer of the network
    assert peak("", 6) > 2 * peak("", 2)


def test_what_two_gpus_exchange_is_weights_statistics_coarse_maps_and_sums():
    config = configuration("--grid 1x2 --image-size 64x128") | {"gpus": 2}
    model = build_from_config(config)
    halves = sum(tensor.nbytes for half in (model.encoder, model.decoder) for tensor in half.state_dict().values()
                 if tensor.is_floating_point())  # weights there, their gradients back; running statistics both ways
    coarse_map, sums, counters = 4 * 16 * 16 * 4, 8 * 4, 10 * 8
    moved = plan.fake_step(config)[0].moved
    for pair in (("cpu:1", "cpu:2"), ("cpu:2", "cpu:1")):  # one way the map, the other way its gradient, twice
        assert moved[pair] == pytest.approx(halves + 2 * coarse_map + sums, abs=counters)


def test_the_largest_image_fits_and_a_larger_one_does_not():
    config = configuration("--grid 2x1 --recompute") | {"gpus": 1}
    side = plan.largest_image(config, 64 * 2**20)
    for size, fits in ((side, True), (side + 16, False)):
        assert (plan.predict(config | {"image_size": (size, size)})[0]["cpu:1"] <= 64 * 2**20) == fits


def test_the_largest_image_fits_where_memory_is_no_straight_line_and_tiles_are_never_single_cells(monkeypatch):
    def bent(config):
        tiling = build_tiling(config, config["image_size"])
        assert all(bottom - top > 1 and right - left > 1 for top, bottom, left, right in tiling.coarse.boxes)
        return {"cpu:1": tiling.size[0] ** 2.1}, {}
    monkeypatch.setattr(plan, "predict", bent)
    config, step = configuration("--depth 9 --grid 2x3 --image-size 2048"), 512 * 6
    assert plan.largest_image(config, (9.9 * step) ** 2.1) == 9 * step
    assert plan.largest_image(config, (1.9 * step) ** 2.1) == 0


def test_every_gpu_and_every_model_is_told(capsys):
    plan.main([*SMALL.split(), "--depth", "1", "--gpus", "2", "--grid", "1x4", "--memory", "1"])
    told = capsys.readouterr().out
    assert "4 tiles" in told and "GPU 0: peak" in told and "GPU 1: peak" in told
    sides = [int(line.split(" x ")[1]) for line in told.splitlines() if " x " in line]
    assert len(sides) == 3 and sides == sorted(sides)


def test_who_runs_out_of_memory_is_told_what_fits(tmp_path, monkeypatch, capsys):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(train, "train_epoch", no_memory)
    with pytest.raises(SystemExit, match="2"):
        train.main([*SMALL.split()[:-1], str(tmp_path / "run"), "--train-images", "2"])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "out of memory; this tells what would fit: python plan.py --run" in said
    monkeypatch.setattr(plan, "largest_image", lambda config, memory: 0)
    words = said.split("plan.py ")[1].split()
    plan.main(words)
    told = capsys.readouterr().out
    assert "4 tiles, batch 1:" in told and "This needs more" not in told
    monkeypatch.setattr(plan, "predict", lambda config: ({"cpu:1": 2**29 if config["recompute"] else 2**40}, Counter()))
    plan.main([*words[:-1], "1"])
    assert "This needs more than 1 GiB. What would fit: --recompute or " in capsys.readouterr().out


@pytest.mark.parametrize("grid, tenths, ways", [("2x2", 9, ["--recompute"]), ("1x1", 5, ["--grid 2x2 --recompute"])])
def test_what_is_said_to_fit_fits(grid, tenths, ways, monkeypatch):
    config = configuration(f"--grid {grid}") | {"gpus": 1}
    limit = tenths / 10 * plan.predict(config)[0]["cpu:1"]
    said = plan.what_fits(config, limit)
    assert set(ways) <= set(said)
    for way in said:
        gpus = int(way.split()[1]) if "--gpus" in way else 1
        changed = configuration(way if "--grid" in way else f"--grid {grid} {way}") | {"gpus": gpus}
        assert max(plan.predict(changed)[0].values()) <= limit
    monkeypatch.setattr(plan, "predict", lambda config: ({"cpu:1": limit + 1}, {}))
    assert plan.what_fits(config, limit) == []
