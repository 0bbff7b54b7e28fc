"""A new run that begins with the weights of another one."""

import json
import shutil

import pytest
import torch
from test_folder import make_folder

import train
from support import checkpoints

pytestmark = pytest.mark.usefixtures("no_pictures")
OPTIONS = "--width 2 --depth 2 --comm-channels 4 --epochs 1 --batch-size 4 --workers 0 --dataset folder".split()
HEAD = {"decoder.head.weight", "decoder.head.bias"}


def run(data, out, *options):
    train.main([*OPTIONS, "--data", str(data), *map(str, options), "--out", str(out)])


def metrics_of(out) -> dict:
    return json.loads((out / "metrics.json").read_text())


def weights_of(path) -> dict:
    return checkpoints.load(path)["model"]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A folder with images of three classes in data, and a run that was trained on them in run. No test changes it."""
    folder = tmp_path_factory.mktemp("first")
    make_folder(folder / "data", 12)
    run(folder / "data", folder / "run")
    return folder


def copy_with_names(first, folder):
    """The same images and masks; but now the classes have names."""
    shutil.copytree(first / "data", folder)
    (folder / "classes.txt").write_text("ground\nwater\nhouse\nroad\n")
    return folder


def test_without_an_epoch_the_scores_are_those_of_the_checkpoint(first, tmp_path, capsys):
    run(first / "data", tmp_path / "run", "--init", first / "run", "--epochs", "0", "--seed", "0")
    assert "test IoU of the best epoch, 0, in" in capsys.readouterr().out
    expected, found = metrics_of(first / "run"), metrics_of(tmp_path / "run")
    assert found["test"] == expected["test"]
    assert found["val"]["iou"] == expected["val"]["iou"]


def test_other_classes_have_a_new_last_layer_and_the_other_weights(first, tmp_path, capsys):
    data = copy_with_names(first, tmp_path / "data")
    run(data, tmp_path / "run", "--init", first / "run/best.pt", "--epochs", "0")
    before, after = weights_of(first / "run/best.pt"), weights_of(tmp_path / "run/best.pt")
    assert before.keys() == after.keys()
    for name in before.keys() - HEAD:
        assert torch.equal(before[name], after[name]), name
    assert after["decoder.head.weight"].shape == (4, 2, 1, 1)
    said = capsys.readouterr().out
    assert "its classes are others, so the last layer is drawn anew" in said


@pytest.mark.parametrize("options, message", [
    ("--comm-channels 0", "its comm_channels is 4; take the same"),
    ("--dilations 1 2 4", "its dilations is [1, 1, 1]; take the same"),
])
def test_weights_of_another_network_are_refused_in_one_line(options, message, first, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(first / "data", tmp_path / "run", "--init", first / "run/best.pt", *options.split())
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.count("\n") == 1
    assert message in said
    assert not (tmp_path / "run").exists()
