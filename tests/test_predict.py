"""A trained network on pictures: masks that a program can read, in bounded memory, and one line for what is broken."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_image_folder import make_deepglobe, make_folder, save
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

import predict
import train
from decompose import Tiling
from support.image_files import read_image
from support.image_folder import ImageFolder
from support.model import build_model, load_model
from support.sizes import build_tiling
from synthetic import LinesAndCircles

CPU = [torch.device("cpu")]
SMALL = "--width 2 --depth 2 --comm-channels 4 --epochs 1 --batch-size 4 --grid 2x2".split()
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """A network for grey images of 64x64 in tiles of 32x32."""
    out = tmp_path_factory.mktemp("grey") / "run"
    train.main([*SMALL, "--train-images", "16", "--out", str(out)])
    return out / "best.pt"


def run(*arguments) -> int:
    """The exit status."""
    try:
        predict.main([str(word) for word in arguments])
    except SystemExit as stopped:
        return stopped.code
    return 0


def expected(checkpoint, image: np.ndarray, grid=None) -> np.ndarray:
    model, config = load_model(checkpoint)
    images = torch.from_numpy(image)[None, None]
    tiling = build_tiling(config, image.shape, grid)
    with torch.no_grad():
        return tiling.stitch(train.run_tiles(model, images, tiling, CPU, config, lambda i, logits: logits.argmax(dim=1)))[0].numpy()


@pytest.mark.parametrize("size", [(64, 64), (70, 133)])
def test_a_mask_is_what_the_network_says_with_a_palette(size, grey, tmp_path):
    image = RNG.integers(0, 256, size, np.uint8)
    assert run(grey, save(tmp_path / "a.png", image), "--out", tmp_path / "out") == 0
    with Image.open(tmp_path / "out/a.png") as picture:
        assert picture.mode == "P" and np.array_equal(np.array(picture), expected(grey, image))
        orange = np.array(picture.convert("RGB"))[np.array(picture) == 1]
        assert (orange == np.rint(255 * np.array(LinesAndCircles.colors[1]))).all()
    with Image.open(tmp_path / "out/a-overlay.png") as picture:
        assert picture.mode == "RGB" and picture.size == size[::-1]


def test_an_array_gives_an_array(grey, tmp_path):
    image = RNG.random((96, 40)).astype(np.float32)
    assert run(grey, save(tmp_path / "a.npy", image), "--out", tmp_path / "out", "--grid", "3x2") == 0
    mask = np.load(tmp_path / "out/a.npy")
    assert mask.dtype == np.uint8 and np.array_equal(mask, expected(grey, image, (3, 2)))


class LargestCopy(TorchDispatchMode):
    """Bytes of the largest tensor made while active, not counting views of `image`."""

    def __init__(self, image):
        super().__init__()
        self.image, self.bytes = image, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not 0 <= tensor.data_ptr() - self.image.data_ptr() < self.image.nbytes:
                self.bytes = max(self.bytes, tensor.nbytes)
        return out


def test_an_array_on_disk_is_read_tile_by_tile(grey, tmp_path):
    image = torch.from_numpy(read_image(save(tmp_path / "a.npy", RNG.random((1024, 1024)))))
    model, config = load_model(grey)
    tiling = build_tiling(config, image.shape[:2], (8, 8))
    with LargestCopy(image) as largest:
        mask = torch.empty(1, 1024, 1024, dtype=torch.uint8)
        predict.segment(model, image.permute(2, 0, 1)[None], tiling, CPU, config, mask)
    assert image.nbytes // 64 <= largest.bytes < image.nbytes // 6  # a tile, not the image; the mask is an eighth


def test_other_images_are_cut_into_tiles_no_larger_than_in_training_unless_those_are_small(grey, tmp_path, capsys):
    run(grey, save(tmp_path / "a.png", np.zeros((64, 600), np.uint8)), "--out", tmp_path / "out")
    assert "64x600 pixels in 1x3 tiles" in capsys.readouterr().out  # those of training have 32 pixels: at least 256
    _, config = load_model(grey)
    large = config | {"image_size": (700, 1000), "grid": (1, 2)}
    assert build_tiling(large, (1400, 1500)).grid == (2, 3) and build_tiling(large, (700, 1000)).grid == (1, 2)


def test_the_overlay_of_a_large_image_is_small(grey, tmp_path):
    run(grey, save(tmp_path / "a.npy", np.zeros((8, 5000), np.uint8)), "--out", tmp_path / "out")
    with Image.open(tmp_path / "out/a-overlay.png") as picture:
        assert picture.size == (1667, 3)


def test_scores_of_predictions_are_those_of_an_evaluation(grey, tmp_path, capsys):
    pairs = [(save(tmp_path / f"images/{name}", RNG.integers(0, 256, size, np.uint8)),
              save(tmp_path / f"masks/{name.replace('png', 'PNG')}", RNG.choice([0, 1, 2, 255], size).astype(np.uint8)))
             for name, size in (("a.png", (64, 64)), ("b.npy", (70, 133)))]
    assert run(grey, *[image for image, _ in pairs], "--masks", tmp_path / "masks", "--out", tmp_path / "out") == 0
    scores = json.loads((tmp_path / "out/metrics.json").read_text())
    model, config = load_model(grey)
    again = train.evaluate(model, DataLoader(ImageFolder(pairs), 1), config, CPU)
    assert scores["all"] == {name: again[name] for name in ("mean_iou", "iou", "seam")}
    assert f"mean IoU {scores['a.png']['mean_iou']:.4f}" in capsys.readouterr().out


def test_a_broken_image_is_skipped_and_the_others_are_done(grey, tmp_path, capsys):
    good = [save(tmp_path / f"{name}.png", np.zeros((32, 32), np.uint8)) for name in "ab"]
    (tmp_path / "broken.png").write_text("no picture")
    assert run(grey, good[0], tmp_path / "broken.png", good[1], "--out", tmp_path / "out") == 1
    assert "broken.png: cannot be read" in capsys.readouterr().err
    assert (tmp_path / "out/a.png").exists() and (tmp_path / "out/b.png").exists() and not (tmp_path / "out/broken.png").exists()


@pytest.mark.parametrize("name, options, message", [
    ("color.png", "", "a 3-channel image, but the network was trained on 1-channel images"),
    ("missing.png", "", "missing.png: no such file"),
    ("grey.png", "--grid 99x1", "99 rows of tiles: an image of 32x32 pixels"),
    ("grey.png", "--grid 0x2", "--grid: '0x2' is not two numbers of 1 to 1048576"),
    ("grey.png", "--gpus 0", "--gpus: '0' is not a number of 1 or more"),
    ("nan.npy", "", "nan.npy: holds nan"),
    ("archive.npy", "", "archive.npy: cannot be read as an array (an archive of several)"),
    ("picture.tif", "", "picture.tif: cannot be read (no PNG or JPEG)"),
    (".", "", ".: a folder; name a PNG"),
    ("grey.png", "--masks nowhere", "--masks nowhere: no such folder"),
    ("grey.png", "--out .", "grey.png: is there already"),
    ("grey.png", "--out color.png", "color.png"),
    ("grey.png", "other/grey.npy", "two images are named grey")])
def test_bad_input_ends_with_one_line_and_status_2(name, options, message, grey, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "grey.png", np.zeros((32, 32), np.uint8)), save(tmp_path / "color.png", np.zeros((32, 32, 3), np.uint8))
    np.save(tmp_path / "nan.npy", np.full((32, 32), np.nan)), save(tmp_path / "picture.tif", np.zeros((32, 32), np.uint8))
    with open(tmp_path / "archive.npy", "wb") as file:
        np.savez(file, image=np.zeros((32, 32)))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert run(grey, name, *options.split()) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_checkpoint_that_is_none_is_named(tmp_path, capsys):
    image = save(tmp_path / "a.png", np.zeros((32, 32), np.uint8))
    assert run(image, image, "--out", tmp_path / "out") == 2
    assert "a.png: cannot be loaded" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_deepglobe_from_its_layout_to_masks(tmp_path, capsys):
    masks = make_deepglobe(tmp_path / "data", [str(i) for i in range(12)])
    train.main([*SMALL, "--epochs", "2", "--dataset", "deepglobe", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")])
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert len(metrics["config"]["classes"]) == 7 and len(metrics["config"]["mean"]) == 3
    assert metrics["test"]["seam"].keys() == {"mean_iou_border", "mean_iou_interior"}
    image = tmp_path / "data/train/3_sat.jpg"
    assert run(tmp_path / "run/best.pt", image, "--masks", tmp_path / "data/train", "--out", tmp_path / "out") == 0
    np.save(tmp_path / "other.npy", np.zeros((24, 32, 3), np.float32))
    assert run(tmp_path / "run/best.pt", tmp_path / "other.npy", "--out", tmp_path / "out") == 2
    assert "numbers of float32, but the network was trained on uint8" in capsys.readouterr().err
    predicted, known = np.array(Image.open(tmp_path / "out/3_sat.png")), masks["3"] != 255
    scores = json.loads((tmp_path / "out/metrics.json").read_text())["all"]
    for label, name in enumerate(metrics["config"]["classes"][:6]):
        one, other = (predicted == label) & known, masks["3"] == label
        assert scores["iou"][name] == pytest.approx((one & other).sum() / (one | other).sum())
    assert scores["mean_iou"] == pytest.approx(np.mean([scores["iou"][name] for name in metrics["config"]["classes"][:6]]))


def test_a_folder_of_several_sizes_trains_on_crops_and_on_whole_images(tmp_path):
    make_folder(tmp_path / "a", 6, size=(40, 56), channels=1), make_folder(tmp_path / "b", 6, size=(48, 33), channels=1)
    for kind in ("images", "masks"):
        for path in (tmp_path / f"b/train/{kind}").iterdir():
            path.rename(tmp_path / f"a/train/{kind}/b{path.name}")
    data = ["--dataset", "folder", "--data", str(tmp_path / "a")]
    for name, options in (("crops", "--crop 24x32"), ("whole", "--batch-size 1")):
        train.main([*SMALL, *data, *options.split(), "--out", str(tmp_path / name)])
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        assert metrics["config"]["classes"] == ["class 0", "class 1", "class 2"] and metrics["test"]["mean_iou"] > 0
    assert json.loads((tmp_path / "crops/metrics.json").read_text())["config"]["image_size"] == [24, 32]


def test_without_its_true_mask_nothing_is_written(grey, tmp_path, capsys):
    image = save(tmp_path / "a.png", np.zeros((32, 32), np.uint8))
    save(tmp_path / "masks/b.png", np.zeros((32, 32), np.uint8))
    assert run(grey, image, "--masks", tmp_path / "masks", "--out", tmp_path / "out") == 2
    assert "holds no mask named a" in capsys.readouterr().err and not (tmp_path / "out").exists()
    save(tmp_path / "masks/a.png", np.full((32, 32), 255, np.uint8))
    assert run(grey, image, "--masks", tmp_path / "masks", "--out", tmp_path / "out") == 2
    assert "no pixel counts" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_scores_that_are_there_are_not_replaced(grey, tmp_path, capsys):
    image = save(tmp_path / "a.png", np.zeros((32, 32), np.uint8))
    before = (grey.parent / "metrics.json").read_bytes()
    assert run(grey, image, "--masks", tmp_path, "--out", grey.parent) == 2
    assert "metrics.json: is there already" in capsys.readouterr().err
    assert (grey.parent / "metrics.json").read_bytes() == before and not (grey.parent / "a.png").exists()


@pytest.mark.parametrize("change", ["value", "image"])
def test_a_run_does_not_go_on_with_other_images(change, tmp_path, capsys):
    make_folder(tmp_path / "data", 12)
    train.main([*SMALL, "--dataset", "folder", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")])
    for i in range(12):
        if change == "value":
            save(tmp_path / f"data/train/masks/{i}.png", np.tile(np.uint8([0, 1]), (16, 12)))
        else:
            save(tmp_path / f"data/train/images/{i}.png", np.zeros((16, 24, 3), np.uint8))
    with pytest.raises(SystemExit, match="2"):
        train.main(["--resume", str(tmp_path / "run")])
    assert "the images are not those of the run" in capsys.readouterr().err


def test_2448_pixels_train_in_uneven_tiles_without_padding(tmp_path):
    make_folder(tmp_path / "data", 3, size=(16, 2448))
    train.main("--width 1 --depth 4 --comm-channels 4 --grid 1x2 --epochs 1 --batch-size 1 --dataset folder --data".split()
               + [str(tmp_path / "data"), "--out", str(tmp_path / "run")])
    _, config = load_model(tmp_path / "run/best.pt")
    assert build_tiling(config, (16, 2448)).boxes == [(0, 16, 0, 1232), (0, 16, 1232, 2448)]


def test_a_tile_is_written_before_its_device_is_given_the_next(monkeypatch):
    """Afterwards it would wait for both, while the other devices have nothing to do."""
    order, devices = [], [torch.device("cpu"), torch.device("cpu", 0)]  # two names for one
    model = build_model(channels=1, classes=2, width=2, depth=1, comm_channels=0)
    config = {"mean": [0.0], "std": [1.0], "amp": False}
    model.decoder.register_forward_hook(lambda *_: order.append("decoded"))
    monkeypatch.setattr(predict, "show_progress", lambda _: order.append("written"))
    out = torch.empty(1, 8, 8, dtype=torch.uint8)
    predict.segment(model, torch.zeros(1, 1, 8, 8), Tiling((8, 8), (2, 2), 2), devices, config, out)
    assert order == ["decoded", *3 * ["decoded", "written"], "written"]
