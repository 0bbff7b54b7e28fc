"""What the README promises: its commands run, its tour names every file, and each tutorial file can be copied alone."""

import os
import re
import shlex
import subprocess
import sys
from multiprocessing.pool import ThreadPool

import numpy as np
import pytest
from conftest import ROOT
from test_image_folder import make_deepglobe, make_folder, save

import predict
import train

README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
            for line in block.splitlines() if line.strip() and not line.startswith("#")]
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SMALL = "--width 4 --epochs 1 --batch-size 4".split()
ALONE = {"unet.py", "comm_net.py", "decompose.py", "synthetic.py"}


def test_the_readme_leads_with_the_two_commands():
    assert COMMANDS[:2] == ["pip install -r requirements.txt && python train.py --gpus 4 --dataset synthetic",
                            "pip install -r requirements.txt && python -m pytest"]


PARTS = sorted({part for line in COMMANDS for part in line.split(" && ")})


def run(command, folder, *more):
    """What a command of the README does, in a folder. To start a program takes longer than what it does here."""
    words, here = shlex.split(command), os.getcwd()
    os.chdir(folder)
    try:
        {"train.py": train, "predict.py": predict}[words[1]].main([*words[2:], *map(str, more)])
    finally:
        os.chdir(here)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that holds what the commands speak of: DIR in both layouts, images, masks, a trained network."""
    place = tmp_path_factory.mktemp("place")
    make_folder(place / "DIR", 12, size=(64, 64))
    make_deepglobe(place / "DIR", [str(i) for i in range(12)])
    save(place / "IMAGE.png", np.zeros((64, 64, 3), np.uint8)), save(place / "ANOTHER.npy", np.zeros((80, 99, 3), np.uint8))
    save(place / "MASKS/IMAGE.png", np.zeros((64, 64), np.uint8))
    run("python train.py --dataset folder --data DIR", place, *SMALL, "--out", "runs/NAME")
    return place


def test_the_first_command_runs_as_a_program_of_its_own(tmp_path):
    command = [sys.executable, ROOT / "train.py", *"--gpus 4 --dataset synthetic --train-images 8".split(), *SMALL]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and "4 GPUs asked for" in result.stdout, result.stderr


@pytest.mark.parametrize("command", [part for part in PARTS if part.startswith("python train.py")])
def test_every_training_command_runs(command, place, tmp_path):
    smaller = ["--train-images", "8"] if "--data " not in command else ["--crop", "32"] if "--crop" in command else []
    run(command, place, *SMALL, *smaller, "--out", tmp_path / "run")
    assert (tmp_path / "run/metrics.json").exists()


@pytest.mark.parametrize("command", [part for part in PARTS if part.startswith("python predict.py")])
def test_every_prediction_command_runs(command, place, tmp_path):
    run(command, place, "--out", tmp_path)
    assert (tmp_path / "IMAGE-overlay.png").exists() and (tmp_path / "metrics.json").exists() == ("--masks" in command)


@pytest.mark.parametrize("command", [line for line in COMMANDS if "python -m experiments" in line or "python plan" in line])
def test_every_other_command_is_understood(command):
    words = shlex.split(command)
    words[:words.index("python") + 1] = [sys.executable]  # without the variables in front of it
    result = subprocess.run([*words, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "usage:" in result.stdout, result.stderr
    unknown = set(re.findall(r"--[a-z-]+", command)) - set(re.findall(r"--[a-z-]+", result.stdout))
    assert not unknown


def test_a_tutorial_file_works_when_copied_alone_with_the_example_of_the_readme(tmp_path):
    def run_alone(name):
        folder = tmp_path / name[:-3]
        folder.mkdir()
        (example,) = [code for code in EXAMPLES if f"from {name[:-3]} import" in code]
        (folder / name).write_text((ROOT / name).read_text())
        (folder / "example.py").write_text(example)
        return subprocess.run([sys.executable, "example.py"], cwd=folder, capture_output=True, text=True).stderr

    assert ThreadPool(2).map(run_alone, ALONE) == len(ALONE) * [""]


def test_the_tour_tells_the_right_length_of_every_file():
    told = dict(re.findall(r"\| \[`([\w/]+\.py)`\]\([\w/.]+\) \| (\d+) \|", README))
    assert {name for name in told} == {path.name for path in ROOT.glob("*.py")}
    assert told == {name: str(len((ROOT / name).read_text().splitlines())) for name in told}


def test_the_code_that_the_tour_shows_is_the_code():
    lines = {line.strip() for path in ROOT.glob("*.py") for line in path.read_text().splitlines()}
    shown = [line.strip() for block in re.findall(r"```py\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
    assert shown and [line for line in shown if line not in lines] == []


def test_every_picture_of_the_readme_exists_and_is_small():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert pictures and all((ROOT / name).stat().st_size < 300_000 for name in pictures)


def test_ci_runs_the_test_command_of_the_readme():
    assert COMMANDS[1].split(" && ")[1] == "python -m pytest"
    assert "README.md" in (ROOT / ".ci/run").read_text()
