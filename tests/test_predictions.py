"""Folders of images to predict: which images are found, where their masks go, and which true masks they have."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIG
from test_image_folder import make_deepglobe, random_image, random_mask, save
from test_predict import read_picture, run, save_black

import predict
from support import checkpoints, predictions
from support.image_files import DataError
from support.model import build_from_config
from support.predictions import find_jobs

KNOWN = {**CONFIG, "dataset": "folder", "dtype": "uint8", "colors": [(0, 0, 0), (1, 0, 0), (0, 0, 1)], "grid": (2, 2),
         "image_size": (32, 32), "overlap": 0, "mean": [0.5], "std": [0.05]}


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """The checkpoint of a network for grey pictures. It has learned nothing, but tells one pixel from another."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("network") / "best.pt"
    model = build_from_config(KNOWN)
    model.decoder.head.bias.data.zero_()
    checkpoints.save(path, {"config": KNOWN, "model": model.state_dict()})
    return path


def places(*named, deepglobe=False) -> list[str]:
    """The places of the images that are found."""
    jobs = find_jobs(list(named), Path("../out"), deepglobe, probabilities=False)
    return [job.relative.as_posix() for job in jobs]


def files_below(folder) -> set[str]:
    found = set()
    for path in folder.rglob("*"):
        if path.is_file():
            found.add(path.relative_to(folder).as_posix())
    return found


# Which images, and where they go

@pytest.fixture
def scans(tmp_path):
    """A folder with three images in two subfolders, of which two have the same name."""
    save_black(tmp_path / "scans/2020/tile.png")
    save_black(tmp_path / "scans/2021/tile.png")
    save_black(tmp_path / "scans/2021/north/other.npy")
    return tmp_path / "scans"


def test_a_folder_gives_all_images_in_it_and_its_subfolders(scans):
    assert places(scans) == ["2020/tile.png", "2021/north/other.npy", "2021/tile.png"]


def test_several_folders_keep_their_names(scans):
    assert places(scans / "2020", scans / "2021/north") == ["2020/tile.png", "2021/north/other.npy"]


def test_folders_and_files_may_be_mixed(scans):
    assert places(scans / "2021/north", scans / "2021/tile.png") == ["north/other.npy", "tile.png"]


def test_files_of_one_folder_go_by_their_names_alone(scans):
    save_black(scans / "2020/second.png")
    assert places(scans / "2020/tile.png", scans / "2020/second.png") == ["tile.png", "second.png"]


def test_files_of_the_same_name_in_two_folders_keep_the_folders(scans):
    assert places(scans / "2020/tile.png", scans / "2021/tile.png") == ["2020/tile.png", "2021/tile.png"]


def test_an_image_that_is_named_twice_is_predicted_once(scans):
    assert places(scans / "2020", scans / "2020/tile.png", scans / "2021/../2020/tile.png") == ["tile.png"]


def test_a_path_may_be_relative(scans, monkeypatch):
    monkeypatch.chdir(scans / "2021")
    assert places(Path("north")) == ["other.npy"]
    assert places(Path("."), Path("../2020")) == ["2021/north/other.npy", "2021/tile.png", "2020/tile.png"]


def test_hidden_files_and_folders_are_no_images_and_other_kinds_are_said_to_be_left_out(scans, capsys):
    save_black(scans / "2020/.hidden.png")
    save_black(scans / ".thumbnails/tile.png")
    (scans / "2020/notes.txt").write_text("sunny")
    assert places(scans / "2020") == ["tile.png"]
    assert "2020: files of other kinds are left out (1, the first is notes.txt)" in capsys.readouterr().out


def test_of_deepglobes_folder_the_masks_are_no_images_to_predict(tmp_path):
    make_deepglobe(tmp_path, ["1", "2"])
    assert places(tmp_path / "train", deepglobe=True) == ["1_sat.jpg", "2_sat.jpg"]
    save(tmp_path / "other/a.png", random_image((8, 8)))
    assert places(tmp_path / "other", deepglobe=True) == ["a.png"]


def test_masks_beside_images_are_left_out_unless_they_are_named(tmp_path, capsys):
    for path in ("test/images/a.png", "test/masks/a.png", "val/images/north/b.png", "val/masks/north/b.png"):
        save_black(tmp_path / path)
    assert places(tmp_path) == ["test/images/a.png", "val/images/north/b.png"]
    said = capsys.readouterr().out
    for split in ("test", "val"):
        assert said.count(f"{tmp_path / split / 'masks'}: left out, as it lies beside images\n") == 1
    assert places(tmp_path / "test/masks") == ["a.png"]
    save_black(tmp_path / "carnival/masks/mask.png")
    assert places(tmp_path / "carnival") == ["masks/mask.png"]


@pytest.mark.parametrize("name, other, written", [
    ("2020/tile.png", "2020/tile.jpg", "2020/tile.png"),
    ("2020/tile.png", "2020/tile.npy", "2020/tile-overlay.png"),
    ("2020/tile.png", "2020/tile-overlay.png", "2020/tile-overlay.png"),
])
def test_two_images_for_one_file_are_named_before_anything_is_computed(name, other, written, network, scans, capsys):
    save_black(scans / other)
    out = scans.with_name("out")
    assert run(network, scans, "--out", out) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"would both be written to {out / written}" in said
    assert str(scans / name) in said
    assert str(scans / other) in said
    assert not out.exists()


def test_a_folder_without_images_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no image"):
        places(tmp_path / "empty")


@pytest.mark.parametrize("out", ["", "2020/masks"])
def test_masks_do_not_go_where_they_would_be_taken_for_images(out, scans, network, capsys):
    assert run(network, scans, "--out", scans / out) == 2
    assert "where the masks would be taken for images; name another --out" in capsys.readouterr().err
    assert files_below(scans) == {"2020/tile.png", "2021/tile.png", "2021/north/other.npy"}


# What is written

def test_masks_of_a_folder_keep_its_shape(network, scans):
    bright = save(scans / "2021/tile.png", random_image((32, 32), channels=1))
    out = scans.with_name("out")
    assert run(network, scans, "--out", out) == 0
    assert files_below(out) == {
        "2020/tile.png", "2020/tile-overlay.png",
        "2021/tile.png", "2021/tile-overlay.png",
        "2021/north/other.npy", "2021/north/other-overlay.png",
    }
    assert run(network, bright, "--out", scans.with_name("alone")) == 0
    alone = read_picture(scans.with_name("alone") / "tile.png")
    assert np.array_equal(read_picture(out / "2021/tile.png"), alone)
    assert not np.array_equal(read_picture(out / "2020/tile.png"), alone)


def test_broken_images_in_a_folder_do_not_stop_the_others(network, scans, capsys):
    (scans / "2020/broken.png").write_text("no picture")
    save_black(scans / "2020/scan.bmp")
    out = scans.with_name("out")
    assert run(network, scans, "--out", out) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 2
    assert "broken.png: cannot be read" in said
    assert "scan.bmp: cannot be read" in said
    assert (out / "2021/tile.png").exists()


def test_progress_tells_which_image_of_how_many(network, scans, monkeypatch):
    shown = []
    monkeypatch.setattr(predict, "show_progress", shown.append)
    run(network, scans, "--grid", "1x2", "--out", scans.with_name("out"))
    expected = []
    for image in ("image 1 of 3", "image 2 of 3", "image 3 of 3"):
        expected += [f"{image}, tile 1 of 2", f"{image}, tile 2 of 2", ""]
    assert shown == expected


# True masks

@pytest.fixture
def masks(scans):
    """A folder of true masks with the subfolders of the scans."""
    folder = scans.with_name("masks")
    save(folder / "2020/tile.png", random_mask((32, 32)))
    save(folder / "2021/tile.png", random_mask((32, 32)))
    save(folder / "2021/north/other.npy", random_mask((32, 32)))
    return folder


def read_scores(out):
    return json.loads((out / "metrics.json").read_text())


def test_each_image_is_scored_by_the_mask_at_its_place(network, scans, masks):
    out = scans.with_name("out")
    assert run(network, scans, "--masks", masks, "--out", out) == 0
    scores = read_scores(out)
    assert list(scores) == ["2020/tile.png", "2021/north/other.npy", "2021/tile.png", "all"]
    for year in ("2020", "2021"):
        predicted = read_picture(out / year / "tile.png")
        truth = read_picture(masks / year / "tile.png")
        for label, name in enumerate(CONFIG["classes"]):
            both = (predicted == label) & (truth == label)
            either = (predicted == label) | (truth == label)
            assert scores[f"{year}/tile.png"]["iou"][name] == pytest.approx(both.sum() / either.sum())


def test_a_mask_that_is_not_at_the_place_of_its_image_is_found_by_its_name(scans, masks):
    (masks / "2021/north/other.npy").rename(masks / "other.npy")
    jobs = find_jobs([scans], Path("out"), deepglobe=False, probabilities=False)
    predictions.find_truths(jobs, masks, deepglobe=False)
    found = {job.relative.as_posix(): job.truth for job in jobs}
    assert found == {
        "2020/tile.png": masks / "2020/tile.png",
        "2021/tile.png": masks / "2021/tile.png",
        "2021/north/other.npy": masks / "other.npy",
    }


def test_two_images_of_one_name_are_not_scored_by_one_mask(network, scans, capsys):
    masks = scans.with_name("masks")
    save(masks / "tile.png", random_mask((32, 32)))
    assert run(network, scans, "--masks", masks, "--out", scans.with_name("out")) == 2
    said = capsys.readouterr().err
    first, second = scans / "2020/tile.png", scans / "2021/tile.png"
    assert f"{first} and {second} would both be scored by {masks / 'tile.png'}" in said
    assert not scans.with_name("out").exists()


def test_an_image_without_a_mask_is_named_and_the_others_are_scored(network, scans, masks, capsys):
    (masks / "2021/tile.png").unlink()
    out = scans.with_name("out")
    assert run(network, scans, "--masks", masks, "--out", out) == 1
    assert f"{scans / '2021/tile.png'}: {masks} holds no mask named tile; add it" in capsys.readouterr().err
    assert list(read_scores(out)) == ["2020/tile.png", "2021/north/other.npy", "all"]


def test_images_behind_links_are_found_and_each_folder_is_read_once(scans):
    (scans / "linked").symlink_to(scans.parent / "elsewhere")
    save_black(scans.parent / "elsewhere/there.png")
    (scans / "2020/loop").symlink_to(scans)
    (scans / "2020/0").symlink_to(scans / "2021")
    (scans / "z").symlink_to(scans / "2021")
    (scans / ".latest").symlink_to(scans / "2021")
    assert places(scans) == ["2020/tile.png", "2021/north/other.npy", "2021/tile.png", "linked/there.png"]
