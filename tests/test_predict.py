"""A trained network on pictures: masks that a program can read, their scores, and one line for what is broken."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CONFIG, CPU, ROOT
from PIL import Image
from test_folder import random_image, random_mask, save
from torch.utils.data import DataLoader

import predict
import train
from support import checkpoints
from support.folder import ImageFolder
from support.images import DataError, normalise, read_image
from support.memory import LiveMemory
from support.model import build_from_config, load_model
from support.sizes import build_tiling

RNG = np.random.default_rng(0)
COLORS = [(0, 0, 0), (1, 0, 0), (0, 0, 1)]
KNOWN = {**CONFIG, "dataset": "folder", "dtype": "uint8", "colors": COLORS, "grid": (2, 2), "image_size": (32, 32),
         "overlap": 0, "mean": [0.5], "std": [0.3]}
ROUNDING = 2**-12  # float16 has 11 binary digits, so a number from 0.5 to 1 changes by at most this


def make_network(path, **changes):
    """The checkpoint of a network that has learned nothing, but tells one pixel from another."""
    torch.manual_seed(0)
    config = {**KNOWN, **changes}
    model = build_from_config(config)
    model.decoder.head.bias.data.zero_()
    model.decoder.head.weight.data *= 100
    checkpoints.save(path, {"config": config, "model": model.state_dict()})
    return path


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """For grey pictures of 8 bits, trained on 32x32 pixels in tiles of 16x16."""
    return make_network(tmp_path_factory.mktemp("grey") / "best.pt")


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """For grey pictures of 16 bits."""
    return make_network(tmp_path_factory.mktemp("deep") / "best.pt", dtype="uint16")


def run(*arguments) -> int:
    """The exit status of predict.py."""
    words = [str(argument) for argument in arguments]
    try:
        predict.main(words)
    except SystemExit as stopped:
        return stopped.code
    return 0


def save_black(path, size=(32, 32)):
    return save(path, np.zeros(size, np.uint8))


def read_picture(path):
    with Image.open(path) as picture:
        return np.array(picture)


def read_json(path):
    return json.loads(path.read_text())


@pytest.fixture
def out(tmp_path):
    """Where the results go."""
    return tmp_path / "out"


def files_below(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# Masks and probabilities

def logits_by_hand(checkpoint, image, grid=None):
    """(L,H,W) of a grey image (H,W) in float32, from the network itself."""
    model, config = load_model(checkpoint)
    tiling = build_tiling(config, image.shape, grid)
    tiles = []
    for tile in tiling.split(torch.from_numpy(image)[None, None]):
        tiles.append(normalise(tile, config["mean"], config["std"]))
    with torch.no_grad():
        return tiling.stitch(model(tiles, tiling))[0]


def test_a_mask_is_what_the_network_says_and_the_overlay_the_image_under_its_colours(grey, out, tmp_path):
    image = random_image((8, 5000), channels=1)  # of which an overlay shows at most 2048 pixels: every third
    path = save(tmp_path / "a.png", image)
    assert run(grey, path, "--no-amp", "--out", out) == 0
    with Image.open(out / "a.png") as picture:
        mask = np.array(picture)
        shown = np.array(picture.convert("RGB"))
    expected = logits_by_hand(grey, image).argmax(dim=0).numpy()
    assert len(np.unique(expected)) == 3
    assert np.array_equal(mask, expected)
    assert np.array_equal(shown, 255 * np.array(COLORS)[mask])
    overlay = read_picture(out / "a-overlay.png")
    half_covered = (image[::3, ::3, None] + shown[::3, ::3].astype(float)) / 2
    np.testing.assert_allclose(overlay, half_covered, rtol=0, atol=1)
    assert files_below(out) == {"a.png", "a-overlay.png"}


@pytest.mark.parametrize("suffix, read, overlap", [(".png", read_picture, 0), (".npy", np.load, 8)])
def test_probabilities_are_what_the_network_says_and_the_mask_is_their_largest(suffix, read, overlap, out, tmp_path):
    network = make_network(tmp_path / "best.pt", overlap=overlap)
    image = random_image((70, 133), channels=1)
    path = save(tmp_path / f"a{suffix}", image)
    assert run(network, path, "--probabilities", "--no-amp", "--out", out, "--grid", "3x2") == 0
    probabilities = np.load(out / "a-probabilities.npy")
    assert probabilities.dtype == np.float16
    expected = logits_by_hand(network, image, grid=(3, 2)).softmax(dim=0).numpy()
    assert expected.std() > 0.05
    np.testing.assert_allclose(probabilities, expected, rtol=0, atol=ROUNDING)
    mask = read(out / f"a{suffix}")
    assert mask.dtype == np.uint8
    assert np.array_equal(mask, probabilities.argmax(axis=0))


@pytest.mark.parametrize("asked, in_hardware, computed", [
    (None, False, False),
    (None, True, True),
    (True, False, True),
])
def test_bfloat16_is_used_where_the_machine_has_it_whatever_the_checkpoint_says(asked, in_hardware, computed, tmp_path,
                                                                               monkeypatch):
    network = make_network(tmp_path / "best.pt", amp=not computed)
    monkeypatch.setattr(predict, "has_bfloat16", lambda: in_hardware)
    _, config = predict.load_network(network, CPU, asked)
    assert config["amp"] is computed


def test_help_does_not_wait_for_pytorch():
    command = [sys.executable, "-X", "importtime", ROOT / "predict.py", "--help"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0
    assert "--probabilities" in result.stdout
    assert "torch" not in result.stderr


# Tiles

def test_an_array_on_disk_is_read_tile_by_tile(tmp_path):
    model, config = predict.load_network(make_network(tmp_path / "best.pt", dtype="float64"), CPU, amp=False)
    save(tmp_path / "a.npy", RNG.random((1024, 1024)))
    image = read_image(tmp_path / "a.npy")
    with LiveMemory() as memory:
        predict.segment_image(model, config, [CPU], image, "a.npy", probabilities=False, grid=(8, 8))
    assert memory.peak["cpu"] < 3 * image.nbytes  # in a single tile 14 times; the array itself is counted, but not read


def test_a_large_image_is_cut_into_tiles_no_larger_than_in_training_unless_those_are_small():
    assert build_tiling({**KNOWN, "image_size": (64, 64)}, (64, 600)).grid == (1, 3)  # of up to 256 pixels
    large = {**KNOWN, "image_size": (700, 1000), "grid": (1, 2)}
    assert build_tiling(large, (1400, 1500)).grid == (2, 3)
    assert build_tiling(large, (700, 1000)).grid == (1, 2)


# From Python

def test_segment_gives_what_predict_writes_for_the_same_file(deep, out, tmp_path, capsys):
    image = RNG.integers(0, 2**16, (70, 133)).astype(np.uint16)
    path = save(tmp_path / "a.png", image)
    run(deep, path, "--probabilities", "--out", tmp_path / "probable")
    run(deep, path, "--out", out)
    capsys.readouterr()
    mask = predict.segment(str(deep), image)
    assert len(np.unique(mask)) == 3
    assert np.array_equal(mask, read_picture(out / "a.png"))
    probabilities = predict.segment(deep, image[::-1][::-1, :, None], probabilities=True)
    assert np.array_equal(probabilities, np.load(tmp_path / "probable/a-probabilities.npy"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("array, message", [
    (np.ones((32, 32), np.float32), r"are \(1, 'float32'\), but the network was trained on \(1, 'uint16'\)"),
    (np.ones((32, 32), ">u2"), "'>u2'"),
    (np.ones((32, 32, 3), np.uint16), r"\(3, 'uint16'\)"),
    (np.ones((1, 32, 32), np.uint16), r"\(32, 'uint16'\)"),
])
def test_segment_refuses_arrays_of_another_type_or_of_other_channels(array, message, deep):
    with pytest.raises(DataError, match=message):
        predict.segment(deep, array)


def test_segment_says_that_numbers_are_far_from_those_of_training(deep, capsys):
    array = RNG.integers(0, 256, (32, 32)).astype(np.uint16)
    predict.segment(deep, array)
    assert "the array: numbers far from those of training: " in capsys.readouterr().out


# Which images, and where their masks go

@pytest.fixture
def scans(tmp_path):
    """A folder with three images in two subfolders, of which two have the same name."""
    save_black(tmp_path / "scans/2020/tile.png")
    save(tmp_path / "scans/2021/tile.png", random_image((32, 32), channels=1))
    save_black(tmp_path / "scans/2021/north/other.npy")
    return tmp_path / "scans"


def test_masks_of_a_folder_keep_its_tree_and_that_of_a_file_goes_by_its_name(grey, scans, out):
    assert run(grey, scans, scans / "2021/tile.png", "--out", out) == 0
    assert files_below(out) == {
        "2020/tile.png", "2020/tile-overlay.png",
        "2021/tile.png", "2021/tile-overlay.png",
        "2021/north/other.npy", "2021/north/other-overlay.png",
        "tile.png", "tile-overlay.png",
    }
    mask = read_picture(out / "tile.png")
    assert np.array_equal(mask, read_picture(out / "2021/tile.png"))
    assert not np.array_equal(mask, read_picture(out / "2020/tile.png"))


def test_of_two_results_with_the_same_name_the_second_is_refused(grey, out, tmp_path, capsys):
    image = random_image((32, 32), channels=1)
    save(tmp_path / "images/tile-overlay.png", image)
    save(tmp_path / "images/tile.png", image)
    assert run(grey, tmp_path / "images", "--out", out) == 1
    assert "out/tile-overlay.png: is there already; rename one of the two images" in capsys.readouterr().err
    assert read_picture(out / "tile-overlay.png").shape == (32, 32)  # the mask, and not the overlay in colours


@pytest.mark.parametrize("name", ["scans/2020/masks", "link/out"])
def test_masks_do_not_go_where_they_would_be_taken_for_images_also_through_a_link(name, scans, grey, tmp_path, capsys):
    before = files_below(scans)
    (tmp_path / "link").symlink_to(scans)
    assert run(grey, scans, "--out", tmp_path / name) == 2
    assert "where the masks would be taken for images; name another --out" in capsys.readouterr().err
    assert files_below(scans) == before


# Scores

def mask_with_unknown_pixels(size):
    return RNG.choice([0, 1, 2, 255], size).astype(np.uint8)


def test_scores_of_predictions_are_those_of_an_evaluation(grey, out, tmp_path, capsys):
    image = save(tmp_path / "images/a.png", random_image((32, 32), channels=1))
    mask = save(tmp_path / "masks/a.PNG", mask_with_unknown_pixels((32, 32)))
    image_below = save(tmp_path / "images/north/b.npy", random_image((70, 133), channels=1))
    mask_below = save(tmp_path / "masks/north/b.npy", mask_with_unknown_pixels((70, 133)).astype(np.int64))
    assert run(grey, tmp_path / "images", "--masks", tmp_path / "masks", "--out", out, "--no-amp") == 0
    found = read_json(out / "metrics.json")
    model, config = load_model(grey)

    def assert_evaluated(part, *pairs):
        expected = train.evaluate(model, DataLoader(ImageFolder(pairs)), config, [CPU])
        del expected["loss"]
        assert part == json.loads(json.dumps(expected).replace("NaN", "null"))

    assert_evaluated(found["all"], (image, mask), (image_below, mask_below))
    assert_evaluated(found["images"]["north/b"], (image_below, mask_below))
    assert f"  mean         {found['all']['mean_iou']:.4f}\n" in capsys.readouterr().out


@pytest.mark.parametrize("name, values, message", [
    ("other.png", [0, 1], "a.png: {masks} holds no mask named a; add it"),
    ("a.png", [0, 255], "{masks}: the masks know a single class, 0; save the others as 1"),
    ("a.png", [0, 7], "{masks}/a.png: holds the value 7, but a mask holds the classes 0 to 2"),
])
def test_true_masks_that_cannot_be_used_are_refused_before_anything_is_computed(name, values, message, grey, out,
                                                                               tmp_path, capsys):
    image = save_black(tmp_path / "a.png")
    masks = tmp_path / "masks"
    save(masks / name, RNG.choice(values, (32, 32)).astype(np.uint8))
    assert run(grey, image, "--masks", masks, "--out", out) == 2
    assert message.format(masks=masks) in capsys.readouterr().err
    assert not out.exists()


# What is broken, and what is stopped

def stop_at(letter, error, monkeypatch):
    """The prediction of the image of this letter ends with an error, when its files are to be written."""
    write = predict.write

    def stop(content, name):
        if name.endswith(f"{letter}-overlay.png"):
            raise error
        write(content, name)

    monkeypatch.setattr(predict, "write", stop)


@pytest.fixture
def three(tmp_path):
    """Three images, a, b and c, and their masks."""
    for name in ("a.png", "b.png", "c.png"):
        save_black(tmp_path / "images" / name)
        save(tmp_path / "masks" / name, random_mask((32, 32)))
    return tmp_path


@pytest.mark.parametrize("letter, error, status, message", [
    ("b", MemoryError(), 1, "b.png: MemoryError()"),
    ("b", RuntimeError("DefaultCPUAllocator: no memory"), 1, "b.png: DefaultCPUAllocator: no memory"),
    ("b", OSError(28, "No space left on device", "NAME"), 1, "b.png: [Errno 28] No space left on device: 'NAME'"),
    ("b", SyntaxError("not a TIFF file"), 1, "b.png: not a TIFF file"),  # what Pillow says of a broken EXIF
    ("c", KeyboardInterrupt(), 130, "stopped"),
])
def test_what_stops_one_image_is_one_line_and_the_others_are_scored(letter, error, status, message, grey, three, out,
                                                                    monkeypatch, capsys):
    stop_at(letter, error, monkeypatch)
    assert run(grey, three / "images", "--masks", three / "masks", "--out", out) == status
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.strip().count("\n") == 0
    assert f"2 of 3 images are done, see {out}" in said.out
    assert read_json(out / "metrics.json")["images"].keys() == {"a", "b", "c"} - {letter}
    assert len(files_below(out)) == 5  # metrics.json, and two for each image that is done


def save_good_and_bad_images(folder):
    save_black(folder / "grey.png")
    save_black(folder / "color.png", size=(32, 32, 3))
    (folder / "broken.png").write_text("no picture")
    (folder / "empty").mkdir()


@pytest.mark.parametrize("name, options, message", [
    ("color.png", "", "color.png: channels and type are (3, 'uint8'), but the network was trained on (1, 'uint8')"),
    ("missing.png", "", "missing.png: there is no such image or folder"),
    ("broken.png", "", "broken.png: cannot be read (cannot identify image file"),
    ("grey.png", "--grid 99x1", "99x1 tiles: an image of 32x32 pixels"),
    ("grey.png", "--grid 0x2", "--grid: 0 is not from 1"),
    (".", "", "--out predictions: is inside ., where the masks would be taken for images"),
    ("grey.png", "--masks nowhere", "nowhere holds no mask named grey; add it"),
    ("grey.png", "--out empty", "File exists: 'empty'"),
])
def test_bad_input_ends_with_one_line_and_status_2(name, options, message, grey, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_good_and_bad_images(tmp_path)
    before = files_below(tmp_path)
    assert run(grey, name, *options.split()) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said
    assert files_below(tmp_path) == before


def test_an_empty_folder_is_no_success(grey, out, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run(grey, tmp_path / "empty", "--out", out) == 2
    assert "0 of 0 images are done" in capsys.readouterr().out
