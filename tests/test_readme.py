"""What the README and the pages in docs/ promise: commands and examples run, and lengths and links are right.

If you change a command, an example, a file's length or its name, one of these tests tells which line to change.
"""

import os
import re
import runpy
import shlex
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from test_folder import make_folder, random_image, save

import predict
import train

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path: path.read_text() for path in PAGES}
README = TEXTS[ROOT / "README.md"]
LESSON = ("unet.py", "comm_net.py", "decompose.py", "train.py")
SCRIPTS = (*LESSON, "synthetic.py", "predict.py", "plan.py")
ALONE = ("unet.py", "comm_net.py", "decompose.py", "synthetic.py")
SMALL = "--width 4 --epochs 1 --batch-size 8".split()


def code_blocks(language: str, without: str = "") -> list[str]:
    """The blocks of code of all pages, but for one."""
    blocks = []
    for page, text in TEXTS.items():
        if page.name == without:
            continue
        blocks += re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return blocks


def commands() -> list[str]:
    """The lines of all bash blocks, without comments."""
    lines = []
    for block in code_blocks("bash"):
        for line in block.splitlines():
            command = line.split("  #")[0].strip()
            if command:
                lines.append(command)
    return lines


COMMANDS = commands()
PARTS = sorted({part for line in COMMANDS for part in line.split(" && ")})
EXAMPLES = code_blocks("python", without="own-encoder.md")  # which needs torchvision: see test_own_encoder.py


def commands_of(start: str) -> list[str]:
    return [part for part in PARTS if part.startswith(start)]


def test_the_readme_leads_with_the_two_commands():
    assert COMMANDS[:2] == ["pip install -r requirements.txt && python train.py --gpus 4 --dataset synthetic",
                            "pip install -r requirements.txt && python -m pytest"]


def test_the_readme_is_short():
    assert len(README.encode()) <= 16_000


# Commands

def run(command: str, folder, *more):
    """What a command does, in a folder. To start a program takes longer than what it does here."""
    program = {"train.py": train, "predict.py": predict}
    words = shlex.split(command)
    here = os.getcwd()
    os.chdir(folder)
    try:
        program[words[1]].main([*words[2:], *map(str, more)])
    finally:
        os.chdir(here)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that holds what the commands speak of: DIR, images, masks, a trained network."""
    place = tmp_path_factory.mktemp("place")
    make_folder(place / "DIR", 12, size=(64, 64))
    save(place / "IMAGE.png", random_image((64, 64)))
    save(place / "IMAGE.tif", np.zeros((64, 64, 3), np.uint8))
    save(place / "IMAGE.npy", np.zeros((64, 64, 3), np.uint8))
    save(place / "SCANS/IMAGE.png", np.zeros((64, 64, 3), np.uint8))
    save(place / "ANOTHER.npy", np.zeros((80, 99, 3), np.uint8))
    save(place / "MASKS/IMAGE.png", np.zeros((64, 64), np.uint8))
    run("python train.py --dataset folder --data DIR", place, *SMALL, "--out", "runs/NAME")
    return place


def test_the_first_command_runs_as_a_program_of_its_own(tmp_path):
    options = "--gpus 4 --dataset synthetic --train-images 8".split()
    command = [sys.executable, ROOT / "train.py", *options, *SMALL]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "4 GPUs asked for" in result.stdout


TRAINING = commands_of("python train.py")


@pytest.mark.parametrize("command", [line for line in TRAINING if "--resume" in line])
def test_every_command_that_resumes_runs(command, place, capsys, no_pictures):
    run(command, place)
    said = "1 of 1 epochs are done; to train longer, begin a new run with its weights: --init"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("command", [line for line in TRAINING if "--resume" not in line])
def test_every_training_command_runs(command, place, tmp_path, no_pictures):
    smaller = []
    if "--data " not in command:
        smaller = ["--train-images", "8"]
    elif "--crop" in command:
        smaller = ["--crop", "32"]
    if "--workers" in command:
        smaller += ["--workers", "1"]  # of an option that is given twice, the second counts
    run(command, place, *SMALL, *smaller, "--out", tmp_path / "run")
    assert (tmp_path / "run/metrics.json").exists()


@pytest.mark.parametrize("command", commands_of("python predict.py"))
def test_every_prediction_command_runs(command, place, tmp_path):
    run(command, place, "--out", tmp_path / "out")
    assert (tmp_path / "out/IMAGE-overlay.png").exists()
    assert (tmp_path / "out/metrics.json").exists() == ("--masks" in command)


OTHERS = [line for line in COMMANDS if "python -m experiments" in line or "python plan" in line]


@pytest.mark.parametrize("command", OTHERS)
def test_every_other_command_is_understood(command, monkeypatch, capsys):
    """In this process, as to start a program takes longer."""
    words = shlex.split(command)
    words = words[words.index("python") + 1:]  # without the variables in front of it
    monkeypatch.setattr(sys, "argv", [*words, "--help"])
    with pytest.raises(SystemExit) as ended:
        if words[0] == "-m":
            monkeypatch.setattr(sys, "argv", sys.argv[1:])
            monkeypatch.delitem(sys.modules, words[1], raising=False)  # else Python warns
            runpy.run_module(words[1], run_name="__main__")
        else:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    assert ended.value.code == 0
    asked = set(re.findall(r"--[a-z-]+", command))
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert asked <= known


def test_ci_runs_the_test_command_of_the_readme():
    assert COMMANDS[1].split(" && ")[1] == "python -m pytest"
    assert "README.md" in (ROOT / ".ci/run").read_text()


# Examples

@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_every_example_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(EXAMPLES[number], {})


def test_the_example_that_segments_an_array_gives_its_mask_and_probabilities(place, monkeypatch):
    monkeypatch.chdir(place)
    (example,) = [code for code in EXAMPLES if "import segment" in code]
    names = {}
    exec(example, names)
    assert names["mask"].shape == (100, 80)
    assert names["probabilities"].shape == (3, 100, 80)


def test_each_file_that_stands_alone_works_in_an_empty_folder(tmp_path):
    """One program imports them, each from a folder of its own, since to start a program takes longer. The
    example of decompose.py runs there too."""
    code = "import sys\n"
    for name in ALONE:
        folder = tmp_path / f"only {name}"
        folder.mkdir()
        (folder / name).write_text((ROOT / name).read_text())
        module = name.removesuffix(".py")
        code += f"sys.path.insert(0, {str(folder)!r})\nimport {module}\ndel sys.path[0], sys.modules[{module!r}]\n"
    (example,) = [code for code in EXAMPLES if "class Down" in code]
    code += f"sys.path.insert(0, {str(tmp_path / 'only decompose.py')!r})\n{example}"
    (tmp_path / "alone.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": ""}
    result = subprocess.run([sys.executable, "alone.py"], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


# Names, lengths and links

def test_the_readme_tells_the_right_length_of_the_lesson():
    told = dict(re.findall(r"\[`(\w+\.py)`\]\(\w+\.py\)\s+\((\d+)", README))
    lengths = {name: str(len((ROOT / name).read_text().splitlines())) for name in LESSON}
    assert told == lengths


def test_the_readme_names_every_script():
    support = [path.name for path in ROOT.glob("support/*.py")]
    for name in [*SCRIPTS, *support]:  # scripts of your own may lie beside them
        assert re.search(rf"^ *{name} ", README, re.MULTILINE), name


def test_the_pages_name_every_experiment():
    everything = "\n".join(TEXTS.values())
    for path in ROOT.glob("experiments/*.py"):
        assert f"`{path.name}`" in everything, path


def test_every_link_leads_somewhere_and_every_picture_is_small():
    for page, text in TEXTS.items():
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for name in re.findall(r"\]\(([^)#]+)\)", prose):
            if name.startswith("https:"):
                continue
            path = page.parent / name
            assert path.exists(), f"{page.name}: {name}"
            limit = 500_000 if path.suffix == ".gif" else 300_000
            assert path.suffix not in (".png", ".gif") or path.stat().st_size < limit
