"""A new run that begins with the weights of another one."""

import json
import shutil

import pytest
import torch
from test_folder import make_folder

import train
from support import checkpoints

pytestmark = pytest.mark.usefixtures("no_pictures")
OPTIONS = "--width 2 --depth 2 --comm-channels 4 --epochs 1 --batch-size 4 --dataset folder"


def run(data, out, options: str) -> dict:
    """Returns what metrics.json holds."""
    arguments = f"{OPTIONS} --data {data} --out {out} {options}"
    train.main(arguments.split())
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A folder with images of three classes in data, and a run that was trained on them in run. No test changes it."""
    folder = tmp_path_factory.mktemp("first")
    make_folder(folder / "data", 12)
    run(folder / "data", folder / "run", "--workers 0")
    return folder


def test_without_an_epoch_the_scores_are_those_of_the_checkpoint(first, tmp_path):
    found = run(first / "data", tmp_path / "run", f"--init {first}/run --epochs 0")
    expected = json.loads((first / "run/metrics.json").read_text())
    assert found["test"] == expected["test"]


def test_other_classes_have_a_new_last_layer_and_the_other_weights(first, tmp_path, capsys):
    data = shutil.copytree(first / "data", tmp_path / "data")
    (data / "classes.txt").write_text("ground\nwater\nhouse\nroad\n")
    run(data, tmp_path / "run", f"--init {first}/run/best.pt --epochs 0")
    before = checkpoints.load(first / "run/best.pt")["model"]
    after = checkpoints.load(tmp_path / "run/best.pt")["model"]
    assert before.keys() == after.keys()
    changed = set()
    for name, weight in before.items():
        if not torch.equal(weight, after[name]):
            changed.add(name)
    assert changed == {"decoder.head.weight", "decoder.head.bias"}
    said = capsys.readouterr().out
    assert "its classes are others, so the last layer is drawn anew" in said


@pytest.mark.parametrize("options, message", [
    ("--comm-channels 0", "its comm_channels is 4; take the same"),
    ("--dilations 1 2 4", "its dilations is [1, 1, 1]; take the same"),
])
def test_weights_of_another_network_are_refused_in_one_line(options, message, first, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(first / "data", tmp_path / "run", f"--init {first}/run/best.pt {options}")
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.count("\n") == 1
    assert message in said
    assert not (tmp_path / "run").exists()
