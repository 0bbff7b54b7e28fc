"""A trained network on pictures: masks that a program can read, in bounded memory, and one line for what is broken."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_image_folder import make_deepglobe, make_folder, random_image, random_mask, save, save_pair
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

pytestmark = pytest.mark.usefixtures("no_pictures")
CPU = [torch.device("cpu")]
SMALL = "--width 2 --depth 2 --comm-channels 4 --epochs 1 --batch-size 4 --grid 2x2".split()
RNG = np.random.default_rng(0)


def train_small(out, *options):
    """A run of a small network. Returns what its metrics.json holds."""
    train.main([*SMALL, *options, "--out", str(out)])
    return read_json(out / "metrics.json")


def read_json(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """The checkpoint of a network for grey images of 64x64 in tiles of 32x32."""
    out = tmp_path_factory.mktemp("grey") / "run"
    train_small(out, "--train-images", "16")
    return out / "best.pt"


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


# Masks

def most_likely_class(i, logits):
    return logits.argmax(dim=1)


def predict_by_hand(checkpoint, image, grid=None):
    """The mask (H,W) of a grey image (H,W), from the tiles of the network."""
    model, config = load_model(checkpoint)
    images = torch.from_numpy(image)[None, None]
    tiling = build_tiling(config, image.shape, grid)
    with torch.no_grad():
        tiles = train.run_tiles(model, images, tiling, CPU, config, most_likely_class)
    return tiling.stitch(tiles)[0].numpy()


SIZES = pytest.mark.parametrize("size", [(64, 64), (70, 133)])


@SIZES
def test_a_mask_is_what_the_network_says(size, grey, tmp_path):
    image = random_image(size, channels=1)
    save(tmp_path / "a.png", image)
    assert run(grey, tmp_path / "a.png", "--out", tmp_path / "out") == 0
    mask = read_picture(tmp_path / "out/a.png")
    assert np.array_equal(mask, predict_by_hand(grey, image))


@SIZES
def test_a_mask_has_a_palette_of_the_colours_of_its_classes(size, grey, tmp_path):
    save(tmp_path / "a.png", random_image(size, channels=1))
    run(grey, tmp_path / "a.png", "--out", tmp_path / "out")
    with Image.open(tmp_path / "out/a.png") as picture:
        assert picture.mode == "P"
        mask = np.array(picture)
        shown = np.array(picture.convert("RGB"))
    color = np.rint(255 * np.array(LinesAndCircles.colors[1]))
    assert (shown[mask == 1] == color).all()


@SIZES
def test_the_overlay_is_a_picture_of_the_size_of_the_image(size, grey, tmp_path):
    save(tmp_path / "a.png", random_image(size, channels=1))
    run(grey, tmp_path / "a.png", "--out", tmp_path / "out")
    overlay = read_picture(tmp_path / "out/a-overlay.png")
    height, width = size
    assert overlay.shape == (height, width, 3)


def test_the_overlay_of_a_large_image_is_small(grey, tmp_path):
    save_black(tmp_path / "a.npy", size=(8, 5000))
    run(grey, tmp_path / "a.npy", "--out", tmp_path / "out")
    overlay = read_picture(tmp_path / "out/a-overlay.png")
    assert overlay.shape == (3, 1667, 3)


def test_an_array_gives_an_array(grey, tmp_path):
    image = RNG.random((96, 40)).astype(np.float32)
    save(tmp_path / "a.npy", image)
    assert run(grey, tmp_path / "a.npy", "--out", tmp_path / "out", "--grid", "3x2") == 0
    mask = np.load(tmp_path / "out/a.npy")
    assert mask.dtype == np.uint8
    assert np.array_equal(mask, predict_by_hand(grey, image, grid=(3, 2)))


# Tiles

class LargestTensor(TorchDispatchMode):
    """The bytes of the largest tensor that PyTorch makes while this is active, without views of `image`."""

    def __init__(self, image):
        super().__init__()
        self.image = image
        self.bytes = 0

    def is_view(self, tensor):
        offset = tensor.data_ptr() - self.image.data_ptr()
        return 0 <= offset < self.image.nbytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if kwargs is None:
            kwargs = {}
        out = function(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not self.is_view(tensor):
                self.bytes = max(self.bytes, tensor.nbytes)
        return out


def test_an_array_on_disk_is_read_tile_by_tile(grey, tmp_path):
    save(tmp_path / "a.npy", RNG.random((1024, 1024)))
    image = torch.from_numpy(read_image(tmp_path / "a.npy"))
    images = image.permute(2, 0, 1)[None]
    model, config = load_model(grey)
    tiling = build_tiling(config, (1024, 1024), grid=(8, 8))
    with LargestTensor(image) as largest:
        mask = torch.empty(1, 1024, 1024, dtype=torch.uint8)
        predict.segment(model, images, tiling, CPU, config, mask)
    one_tile = image.nbytes // 64
    assert one_tile <= largest.bytes < image.nbytes // 6  # the mask, of one byte instead of eight, is an eighth


def test_a_large_image_is_not_cut_into_tiles_as_small_as_in_training(grey, tmp_path, capsys):
    save_black(tmp_path / "a.png", size=(64, 600))
    run(grey, tmp_path / "a.png", "--out", tmp_path / "out")
    assert "64x600 pixels in 1x3 tiles" in capsys.readouterr().out  # those of training have 32 pixels: at least 256


def test_a_large_image_is_cut_into_tiles_no_larger_than_in_training_unless_those_are_small(grey):
    _, config = load_model(grey)
    config["image_size"] = (700, 1000)
    config["grid"] = (1, 2)
    assert build_tiling(config, (1400, 1500)).grid == (2, 3)
    assert build_tiling(config, (700, 1000)).grid == (1, 2)


def test_2448_pixels_train_in_uneven_tiles_without_padding(tmp_path):
    make_folder(tmp_path / "data", 3, size=(16, 2448))
    options = "--width 1 --depth 4 --grid 1x2 --batch-size 1 --dataset folder --data".split()
    train_small(tmp_path / "run", *options, str(tmp_path / "data"))
    _, config = load_model(tmp_path / "run/best.pt")
    boxes = build_tiling(config, (16, 2448)).boxes
    assert boxes == [(0, 16, 0, 1232), (0, 16, 1232, 2448)]


def test_a_tile_is_written_before_its_device_is_given_the_next(monkeypatch):
    """Afterwards it would wait for both, while the other devices have nothing to do."""
    order = []

    def note_decoded(module, inputs, output):
        order.append("decoded")

    def note_written(text):
        order.append("written")

    model = build_model(channels=1, classes=2, width=2, depth=1, comm_channels=0)
    model.decoder.register_forward_hook(note_decoded)
    monkeypatch.setattr(predict, "show_progress", note_written)
    config = {"mean": [0.0], "std": [1.0], "amp": False}
    devices = [torch.device("cpu"), torch.device("cpu", 0)]  # two names for one
    tiling = Tiling((8, 8), grid=(2, 2), cell=2)
    out = torch.empty(1, 8, 8, dtype=torch.uint8)
    predict.segment(model, torch.zeros(1, 1, 8, 8), tiling, devices, config, out)
    assert order == [
        "decoded",
        "decoded", "written",
        "decoded", "written",
        "decoded", "written",
        "written",
    ]


# Scores

def mask_with_unknown_pixels(size):
    return RNG.choice([0, 1, 2, 255], size).astype(np.uint8)


def test_scores_of_predictions_are_those_of_an_evaluation(grey, tmp_path, capsys):
    a = save(tmp_path / "images/a.png", random_image((64, 64), channels=1))
    b = save(tmp_path / "images/b.npy", random_image((70, 133), channels=1))
    mask_of_a = save(tmp_path / "masks/a.PNG", mask_with_unknown_pixels((64, 64)))
    mask_of_b = save(tmp_path / "masks/b.npy", mask_with_unknown_pixels((70, 133)))
    assert run(grey, a, b, "--masks", tmp_path / "masks", "--out", tmp_path / "out") == 0
    scores = read_json(tmp_path / "out/metrics.json")
    model, config = load_model(grey)
    loader = DataLoader(ImageFolder([(a, mask_of_a), (b, mask_of_b)]))
    expected = train.evaluate(model, loader, config, CPU)
    del expected["loss"]
    assert scores["all"] == expected
    assert f"mean IoU {scores['a.png']['mean_iou']:.4f}" in capsys.readouterr().out


def test_without_its_true_mask_nothing_is_written(grey, tmp_path, capsys):
    image = save_black(tmp_path / "a.png")
    save_black(tmp_path / "masks/b.png")
    assert run(grey, image, "--masks", tmp_path / "masks", "--out", tmp_path / "out") == 2
    assert "holds no mask named a" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_with_a_true_mask_of_which_no_pixel_counts_nothing_is_written(grey, tmp_path, capsys):
    image = save_black(tmp_path / "a.png")
    save(tmp_path / "masks/a.png", np.full((32, 32), 255, np.uint8))
    assert run(grey, image, "--masks", tmp_path / "masks", "--out", tmp_path / "out") == 2
    assert "no pixel counts" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def stop_at(name, error, monkeypatch):
    """The prediction of the image of this name ends with an error."""
    predict_one = predict.predict

    def stop(model, config, image, job, *more):
        if job.name == name:
            raise error
        return predict_one(model, config, image, job, *more)

    monkeypatch.setattr(predict, "predict", stop)


def test_an_image_that_runs_out_of_memory_is_named_and_the_others_are_scored(grey, tmp_path, monkeypatch, capsys):
    for name in ("a", "b", "c"):
        save_black(tmp_path / f"images/{name}.png")
        save_black(tmp_path / f"masks/{name}.png")
    stop_at("b", MemoryError, monkeypatch)
    assert run(grey, tmp_path / "images", "--masks", tmp_path / "masks", "--out", tmp_path / "out") == 1
    said = capsys.readouterr()
    assert f"{tmp_path}/images/b.png: out of memory; take a --grid of more tiles" in said.err
    assert "metrics.json holds the scores of 2 of 3 images" in said.out
    assert read_json(tmp_path / "out/metrics.json").keys() == {"a.png", "c.png", "all"}


def test_ctrl_c_keeps_the_scores_of_the_images_that_are_done(grey, tmp_path, monkeypatch, capsys):
    for name in ("a", "b", "c"):
        save_black(tmp_path / f"images/{name}.png")
        save_black(tmp_path / f"masks/{name}.png")
    stop_at("c", KeyboardInterrupt, monkeypatch)
    assert run(grey, tmp_path / "images", "--masks", tmp_path / "masks", "--out", tmp_path / "out") == 130
    said = capsys.readouterr()
    assert said.err == f"\nstopped after 2 of 3 images, which are in {tmp_path / 'out'}\n"
    assert "metrics.json holds the scores of 2 of 3 images" in said.out
    metrics = read_json(tmp_path / "out/metrics.json")
    assert metrics.keys() == {"a.png", "b.png", "all"}
    assert f"mean IoU of all together {metrics['all']['mean_iou']:.4f}\n" in said.out


def test_an_output_that_nobody_reads_ends_it_and_is_no_failure_of_an_image(grey, tmp_path, monkeypatch, capsys):
    for name in ("a", "b", "c"):
        save_black(tmp_path / f"images/{name}.png")
    stop_at("b", BrokenPipeError, monkeypatch)
    monkeypatch.setattr(predict, "close_output", lambda: None)  # pytest reads it
    assert run(grey, tmp_path / "images", "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err.endswith("error: nobody reads what this prints any more, so it stops\n")


def test_a_file_that_cannot_be_written_is_told_with_its_image(grey, tmp_path, monkeypatch, capsys):
    image = save_black(tmp_path / "a.png")
    stop_at("a", OSError(28, "No space left on device"), monkeypatch)
    assert run(grey, image, "--out", tmp_path / "out") == 2
    assert f"{image}: {tmp_path / 'out'}: No space left on device; see that" in capsys.readouterr().err


def test_true_masks_of_0_and_255_alone_are_refused(grey, tmp_path, capsys):
    image = save_black(tmp_path / "a.png")
    for name in ("a", "b"):
        save(tmp_path / f"masks/{name}.png", RNG.choice([0, 255], (32, 32)).astype(np.uint8))
    assert run(grey, image, "--masks", tmp_path / "masks", "--out", tmp_path / "out") == 2
    assert "masks: the masks know a single class, 0; save the others as 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_true_mask_of_0_and_255_among_others_is_used(grey, tmp_path, capsys):
    image = save_black(tmp_path / "a.png")
    save(tmp_path / "masks/a.png", RNG.choice([0, 255], (32, 32)).astype(np.uint8))
    save(tmp_path / "masks/b.png", np.ones((32, 32), np.uint8))
    assert run(grey, image, "--masks", tmp_path / "masks", "--out", tmp_path / "out") == 0
    assert "the true masks hold no line or circle, so the mean IoU says nothing about that" in capsys.readouterr().out


def test_scores_that_are_there_are_not_replaced(grey, tmp_path, capsys):
    image = save_black(tmp_path / "a.png")
    folder = grey.parent
    before = (folder / "metrics.json").read_bytes()
    assert run(grey, image, "--masks", tmp_path, "--out", folder) == 2
    assert "metrics.json: is there already" in capsys.readouterr().err
    assert (folder / "metrics.json").read_bytes() == before
    assert not (folder / "a.png").exists()


# What is broken

def test_a_broken_image_is_skipped_and_the_others_are_done(grey, tmp_path, capsys):
    a = save_black(tmp_path / "a.png")
    b = save_black(tmp_path / "b.png")
    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    assert run(grey, a, broken, b, "--out", tmp_path / "out") == 1
    assert "broken.png: cannot be read" in capsys.readouterr().err
    assert (tmp_path / "out/a.png").exists()
    assert (tmp_path / "out/b.png").exists()
    assert not (tmp_path / "out/broken.png").exists()


def save_good_and_bad_images(folder):
    save_black(folder / "grey.png")
    save_black(folder / "color.png", size=(32, 32, 3))
    save_black(folder / "picture.bmp")
    save(folder / "nan.npy", np.full((32, 32), np.nan))
    with open(folder / "archive.npy", "wb") as file:
        np.savez(file, image=np.zeros((32, 32)))


def read_all_files(folder):
    return {path: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name, options, message", [
    ("color.png", "", "a 3-channel image, but the network was trained on 1-channel images"),
    ("missing.png", "", "missing.png: no such file"),
    ("grey.png", "--grid 99x1", "99 rows of tiles: an image of 32x32 pixels"),
    ("grey.png", "--grid 0x2", "--grid: '0x2' is not two whole numbers from 1 to 1048576"),
    ("grey.png", "--gpus 0", "--gpus: '0' is not a whole number of at least 1"),
    ("nan.npy", "", "nan.npy: holds nan"),
    ("nowhere.npy", "", "nowhere.npy: no such file; name a PNG, JPEG, TIFF, PPM, PGM or .npy"),
    ("archive.npy", "", "archive.npy: cannot be read as an array (an archive of several)"),
    ("picture.bmp", "", "picture.bmp: cannot be read (no PNG, JPEG, TIFF, PPM or PGM)"),
    (".", "", "--out predictions: is inside ., where the masks would be taken for images"),
    ("grey.png", "--masks nowhere", "--masks nowhere: no such folder"),
    ("grey.png", "--out .", "grey.png: is there already"),
    ("grey.png", "--out color.png", "color.png"),
    ("grey.png", "grey.npy", "grey.png and grey.npy would both be written to predictions/grey-overlay.png"),
])
def test_bad_input_ends_with_one_line_and_status_2(name, options, message, grey, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_good_and_bad_images(tmp_path)
    before = read_all_files(tmp_path)
    assert run(grey, name, *options.split()) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said
    assert read_all_files(tmp_path) == before


def test_a_checkpoint_that_is_none_is_named(tmp_path, capsys):
    image = save_black(tmp_path / "a.png")
    assert run(image, image, "--out", tmp_path / "out") == 2
    assert "a.png: cannot be loaded" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Values of another range

@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    """The checkpoint of a network for grey images of numbers from 0 to 1, in float32."""
    folder = tmp_path_factory.mktemp("floats")
    for i in range(12):
        save(folder / f"data/train/images/{i}.npy", RNG.random((32, 32)).astype(np.float32))
        save(folder / f"data/train/masks/{i}.png", random_mask((32, 32)))
    train_small(folder / "run", "--dataset", "folder", "--data", str(folder / "data"))
    return folder / "run/best.pt"


def predict_array(checkpoint, image, folder):
    """The mask of an image of float32, in files of this folder."""
    path = save(folder / "a.npy", image.astype(np.float32))
    assert run(checkpoint, path, "--out", folder / "out") == 0
    return np.load(folder / "out/a.npy")


@pytest.mark.parametrize("missing", [np.nan, np.inf, -9999])
def test_pixels_without_data_are_taken_as_the_mean(missing, floats, tmp_path, capsys):
    image = RNG.random((32, 32))
    image[:5] = missing
    mask = predict_array(floats, image, tmp_path / "missing")
    said = capsys.readouterr().out
    if np.isfinite(missing):
        assert "a.npy: values from -9999 to " in said
    else:
        assert "a.npy: 160 numbers are nan, inf or beyond 1e38; they are taken as the mean of the training" in said
    _, config = load_model(floats)
    image[:5] = config["mean"]
    assert np.array_equal(mask, predict_array(floats, image, tmp_path / "mean"))
    assert "a.npy: values" not in capsys.readouterr().out


@pytest.mark.parametrize("factor, message", [
    (255, " to 254.9"),
    (1 / 255, " to 0.0039"),
])
def test_images_of_another_range_than_those_of_training_are_named(factor, message, floats, tmp_path, capsys):
    image = RNG.random((32, 32))
    image[0, 0] = 0.9999
    predict_array(floats, factor * image, tmp_path)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "a.npy: values from " in line]
    assert f"{message}" in line and "but the training images have " in line


# DeepGlobe, from its layout to masks

@pytest.fixture(scope="module")
def deepglobe(tmp_path_factory):
    """A folder with DeepGlobe's layout in data, a run that was trained on it in run, and the mask of image 3."""
    folder = tmp_path_factory.mktemp("deepglobe")
    names = [str(i) for i in range(12)]
    masks = make_deepglobe(folder / "data", names)
    np.save(folder / "mask_of_3.npy", masks["3"])
    train_small(folder / "run", "--epochs", "2", "--dataset", "deepglobe", "--data", str(folder / "data"))
    return folder


def test_a_run_on_deepglobe_knows_its_classes_and_has_scores(deepglobe):
    metrics = read_json(deepglobe / "run/metrics.json")
    assert len(metrics["config"]["classes"]) == 7
    assert len(metrics["config"]["mean"]) == 3
    assert metrics["test"]["seam"].keys() == {"mean_iou_border", "mean_iou_interior"}


def iou_by_hand(predicted, truth, label):
    known = truth != 255
    found = (predicted == label) & known
    true = truth == label
    return (found & true).sum() / (found | true).sum()


def test_predictions_for_deepglobe_are_scored_by_its_masks(deepglobe, tmp_path):
    image = deepglobe / "data/train/3_sat.jpg"
    masks = deepglobe / "data/train"
    assert run(deepglobe / "run", image, "--masks", masks, "--out", tmp_path / "out") == 0
    predicted = read_picture(tmp_path / "out/3_sat.png")
    truth = np.load(deepglobe / "mask_of_3.npy")
    scores = read_json(tmp_path / "out/metrics.json")["all"]
    _, config = load_model(deepglobe / "run/best.pt")
    expected = []
    for label, name in enumerate(config["classes"][:6]):  # the seventh is unknown
        iou = iou_by_hand(predicted, truth, label)
        assert scores["iou"][name] == pytest.approx(iou)
        expected.append(iou)
    assert scores["mean_iou"] == pytest.approx(np.mean(expected))


def test_an_array_of_another_type_than_deepglobes_is_refused(deepglobe, tmp_path, capsys):
    image = save(tmp_path / "other.npy", np.zeros((24, 32, 3), np.float32))
    assert run(deepglobe / "run/best.pt", image, "--out", tmp_path / "out") == 2
    assert "numbers of float32, but the network was trained on uint8" in capsys.readouterr().err


# A folder of your own

@pytest.fixture
def two_sizes(tmp_path):
    """A folder of grey images of two sizes."""
    data = tmp_path / "data"
    for name in ("a0", "a1", "a2", "a3", "a4", "a5"):
        save_pair(data, "train", name, random_image((40, 56), channels=1), random_mask((40, 56)))
    for name in ("b0", "b1", "b2", "b3", "b4", "b5"):
        save_pair(data, "train", name, random_image((48, 33), channels=1), random_mask((48, 33)))
    return data


def train_on_folder(data, out, *options):
    return train_small(out, "--dataset", "folder", "--data", str(data), *options)


def test_a_folder_of_several_sizes_trains_on_crops(two_sizes, tmp_path):
    metrics = train_on_folder(two_sizes, tmp_path / "run", "--crop", "24x32")
    assert metrics["config"]["classes"] == ["class 0", "class 1", "class 2"]
    assert metrics["config"]["image_size"] == [24, 32]
    assert metrics["test"]["mean_iou"] > 0


def test_a_folder_of_several_sizes_trains_on_whole_images(two_sizes, tmp_path):
    metrics = train_on_folder(two_sizes, tmp_path / "run", "--batch-size", "1")
    assert metrics["config"]["classes"] == ["class 0", "class 1", "class 2"]
    assert metrics["test"]["mean_iou"] > 0


def change_all_masks(data):
    mask = np.zeros((16, 24), np.uint8)
    mask[:, 1::2] = 1
    for path in sorted((data / "train/masks").iterdir()):
        save(path, mask)


def change_all_images(data):
    for path in sorted((data / "train/images").iterdir()):
        save_black(path, size=(16, 24, 3))


@pytest.mark.parametrize("change", [change_all_masks, change_all_images])
def test_a_run_does_not_go_on_with_other_images(change, tmp_path, capsys):
    data = make_folder(tmp_path / "data", 12)
    train_on_folder(data, tmp_path / "run")
    change(data)
    with pytest.raises(SystemExit, match="2"):
        train.main(["--resume", str(tmp_path / "run")])
    assert "the images are not those of the run" in capsys.readouterr().err
