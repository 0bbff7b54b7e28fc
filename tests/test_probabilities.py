"""predict.py --probabilities: what the network says, whose largest is the mask, and never as a whole in memory."""

import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from test_image_folder import random_image, save
from test_predict import CPU, LargestTensor, read_picture, run, save_black
from test_predictions import KNOWN, files_below

import predict
import train
from support import checkpoints
from support.model import build_from_config, load_model
from support.predictions import round_probabilities
from support.sizes import build_tiling

ROUNDING = 2**-11  # a float16 from 0.5 to 1 is at most half of this away from what was rounded; ties add one step of it


def make_network(path, contrast, **changes):
    """The checkpoint of a network whose logits differ by about `contrast`, with changes to its configuration."""
    torch.manual_seed(0)
    config = {**KNOWN, **changes}
    model = build_from_config(config)
    model.decoder.head.bias.data.zero_()
    model.decoder.head.weight.data *= contrast
    checkpoints.save(path, {"config": config, "model": model.state_dict()})
    return path


@pytest.fixture(scope="module")
def certain(tmp_path_factory):
    return make_network(tmp_path_factory.mktemp("certain") / "best.pt", contrast=100)


@pytest.fixture(scope="module")
def undecided(tmp_path_factory):
    """All its probabilities are so close to 1/3 that most are equal in float16."""
    return make_network(tmp_path_factory.mktemp("undecided") / "best.pt", contrast=0.001)


def keep_logits(i, logits):
    return logits


def probabilities_by_hand(checkpoint, image, grid):
    """(L,H,W) in float32 of a grey image (H,W)."""
    model, config = load_model(checkpoint)
    images = torch.from_numpy(image)[None, None]
    tiling = build_tiling(config, image.shape, grid)
    with torch.no_grad():
        tiles = train.run_tiles(model, images, tiling, CPU, config, keep_logits)
    logits = tiling.stitch(tiles)[0]
    return logits.float().softmax(dim=0).numpy()


def ask(network, image, out, *options) -> int:
    """The exit status of predict.py --probabilities."""
    return run(network, image, "--probabilities", *options, "--out", out)


# What is written

@pytest.mark.parametrize("overlap", [0, 8])
@pytest.mark.parametrize("suffix", [".png", ".npy"])
def test_probabilities_are_what_the_network_says(suffix, overlap, tmp_path):
    network = make_network(tmp_path / "best.pt", contrast=100, overlap=overlap)
    image = random_image((70, 133), channels=1)
    path = save(tmp_path / f"a{suffix}", image)
    assert ask(network, path, tmp_path / "out", "--grid", "3x2") == 0
    probabilities = np.load(tmp_path / "out/a-probabilities.npy")
    assert probabilities.dtype == np.float16
    expected = probabilities_by_hand(network, image, grid=(3, 2))
    assert 0.1 < expected.std()
    np.testing.assert_allclose(probabilities, expected, rtol=0, atol=ROUNDING)


def test_probabilities_are_those_of_bfloat16_in_more_digits(tmp_path):
    network = make_network(tmp_path / "best.pt", contrast=100, amp=True)
    image = random_image((32, 32), channels=1)
    path = save(tmp_path / "a.png", image)
    ask(network, path, tmp_path / "out")
    probabilities = np.load(tmp_path / "out/a-probabilities.npy")
    expected = probabilities_by_hand(network, image, grid=(2, 2))
    np.testing.assert_allclose(probabilities, expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("name", ["certain", "undecided"])
def test_the_largest_probability_is_that_of_the_mask_and_all_add_up_to_1(name, request, tmp_path):
    network = request.getfixturevalue(name)
    path = save(tmp_path / "a.png", random_image((70, 133), channels=1))
    ask(network, path, tmp_path / "out", "--grid", "3x2")
    probabilities = np.load(tmp_path / "out/a-probabilities.npy")
    mask = read_picture(tmp_path / "out/a.png")
    assert len(np.unique(mask)) == 3
    assert np.array_equal(probabilities.argmax(axis=0), mask)
    total = probabilities.astype(np.float32).sum(axis=0)
    np.testing.assert_allclose(total, 1, rtol=0, atol=2 * ROUNDING)


def test_the_mask_is_the_same_with_probabilities_and_without(undecided, tmp_path):
    path = save(tmp_path / "a.png", random_image((32, 32), channels=1))
    ask(undecided, path, tmp_path / "with")
    run(undecided, path, "--out", tmp_path / "without")
    mask = read_picture(tmp_path / "with/a.png")
    assert np.array_equal(mask, read_picture(tmp_path / "without/a.png"))
    assert files_below(tmp_path / "without") == {"a.png", "a-overlay.png"}


# Rounding

def test_a_probability_is_rounded_to_the_nearest():
    probabilities = torch.rand(1, 3, 50, 50).softmax(dim=1)
    probabilities[0, 0] += 1  # far from the others
    classes = torch.zeros(1, 50, 50, dtype=torch.long)
    assert torch.equal(round_probabilities(probabilities, classes), probabilities.half())


ABOVE_A_HALF = 0.5 + 2**-11  # the float16 that follows 0.5
ABOVE_A_QUARTER = 0.25 + 2**-12


@pytest.mark.parametrize("values, largest, expected", [
    ([0.1875, 0.250001, 0.25], 1, [0.1875, ABOVE_A_QUARTER, 0.25]),
    ([0.250001, 0.25, 0.1875], 0, [ABOVE_A_QUARTER, 0.25, 0.1875]),
    ([0.5, 0.5], 1, [0.5, ABOVE_A_HALF]),
    ([0.125, 0.75, 0.125], 1, [0.125, 0.75, 0.125]),
])
def test_of_probabilities_that_rounding_makes_equal_the_largest_stays_the_largest(values, largest, expected):
    probabilities = torch.tensor(values).view(1, -1, 1, 1)
    classes = torch.full((1, 1, 1), largest)
    rounded = round_probabilities(probabilities, classes)
    assert rounded.flatten().tolist() == expected


# In pieces, and whole or not at all

TWO_DEVICES = [torch.device("cpu"), torch.device("cpu", 0)]  # two names for one


@pytest.mark.parametrize("devices", [CPU, TWO_DEVICES])
def test_probabilities_are_written_tile_by_tile_from_any_number_of_devices(devices, certain, tmp_path):
    image = random_image((512, 512), channels=1)
    images = torch.from_numpy(image)[None, None]
    probabilities = np.lib.format.open_memmap(tmp_path / "p.npy", "w+", np.float16, (3, 512, 512))
    whole = torch.from_numpy(probabilities)[None]
    mask = torch.empty(1, 512, 512, dtype=torch.uint8)
    model, config = load_model(certain)
    tiling = build_tiling(config, (512, 512), grid=(8, 8))
    with LargestTensor(whole) as largest:
        predict.segment(model, images, tiling, devices, config, mask, whole)
    assert largest.bytes < probabilities.nbytes / 2  # the coarse map of the whole image is a third
    expected = probabilities_by_hand(certain, image, grid=(8, 8))
    np.testing.assert_allclose(probabilities, expected, rtol=0, atol=ROUNDING)


def test_probabilities_that_are_there_are_not_replaced(certain, tmp_path, capsys):
    path = save_black(tmp_path / "a.png")
    there = save(tmp_path / "out/a-probabilities.npy", np.ones(3))
    assert ask(certain, path, tmp_path / "out") == 2
    assert "a-probabilities.npy: is there already; take another --out" in capsys.readouterr().err
    assert np.array_equal(np.load(there), np.ones(3))
    assert files_below(tmp_path / "out") == {"a-probabilities.npy"}


def test_a_prediction_that_is_stopped_leaves_nothing(certain, tmp_path, monkeypatch):
    def stop(text):
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "show_progress", stop)
    path = save_black(tmp_path / "a.npy")
    with pytest.raises(SystemExit, match="130"):
        predict.main([str(certain), str(path), "--probabilities", "--out", str(tmp_path / "out")])
    assert files_below(tmp_path / "out") == set()


def test_a_disk_without_space_is_named_before_anything_is_written(certain, tmp_path, monkeypatch, capsys):
    def almost_full(path):
        return namedtuple("usage", "free")(2**20)

    monkeypatch.setattr(shutil, "disk_usage", almost_full)
    path = save_black(tmp_path / "a.png", size=(600, 600))
    assert ask(certain, path, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "out needs 2.1 MiB for it, but the disk has only 1.0; make space, or name another --out" in said
    assert files_below(tmp_path / "out") == set()


def test_two_images_do_not_write_to_the_same_probabilities(certain, tmp_path, capsys):
    save_black(tmp_path / "scans/a.png")
    save_black(tmp_path / "scans/a-probabilities.npy")
    assert run(certain, tmp_path / "scans", "--out", tmp_path / "without") == 0
    assert ask(certain, tmp_path / "scans", tmp_path / "with") == 2
    assert f"would both be written to {tmp_path / 'with/a-probabilities.npy'}" in capsys.readouterr().err
