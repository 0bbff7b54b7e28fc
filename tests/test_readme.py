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
README = PAGES[0].read_text()
LESSON = ("unet.py", "comm_net.py", "decompose.py", "train.py")
ALONE = ("unet.py", "comm_net.py", "decompose.py", "synthetic.py")
SMALL = "--width 4 --epochs 1 --batch-size 8".split()


def code_blocks(language: str, without: str = "") -> list[str]:
    """The blocks of code of all pages, but for one."""
    blocks = []
    for page in PAGES:
        if page.name != without:
            blocks += re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)
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


def commands_of(program: str) -> list[str]:
    """The different commands that run a program."""
    found = set()
    for line in commands():
        for part in line.split(" && "):
            if program in part:
                found.add(part)
    return sorted(found)


def example_with(words: str) -> str:
    """The first example that holds these words."""
    for code in EXAMPLES:
        if words in code:
            return code


EXAMPLES = code_blocks("python", without="own-encoder.md")  # which needs torchvision: see test_own_encoder.py


def test_the_readme_is_short_and_leads_with_the_two_commands():
    assert len(README.encode()) <= 16_000
    first, second = commands()[:2]
    assert first == "pip install -r requirements.txt && python train.py --gpus 4 --dataset synthetic"
    assert second == "pip install -r requirements.txt && python -m pytest"


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
    image = random_image((64, 64))
    for name in ("IMAGE.png", "IMAGE.tif", "IMAGE.npy", "ANOTHER.npy", "SCANS/IMAGE.png"):
        save(place / name, image)
    save(place / "MASKS/IMAGE.png", np.eye(64, dtype=np.uint8))
    run("python train.py --dataset folder --data DIR", place, *SMALL, "--out", "runs/NAME")
    return place


def test_the_first_command_runs_as_a_program_of_its_own(tmp_path):
    options = "--gpus 4 --dataset synthetic --train-images 8".split()
    command = [sys.executable, ROOT / "train.py", *options, *SMALL]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "4 GPUs asked for" in result.stdout


@pytest.mark.parametrize("command", commands_of("python train.py"))
def test_every_training_command_runs(command, place, tmp_path, capsys, no_pictures):
    if "--resume" in command:
        run(command, place)
        assert "1 of 1 epochs are done" in capsys.readouterr().out
        return
    smaller = ["--train-images", "8", "--workers", "0"]  # of an option that is given twice, the second counts
    if "--crop" in command:
        smaller += ["--crop", "32"]
    run(command, place, *SMALL, *smaller, "--out", tmp_path / "run")
    assert (tmp_path / "run/metrics.json").exists()


@pytest.mark.parametrize("command", commands_of("python predict.py"))
def test_every_prediction_command_runs(command, place, tmp_path):
    run(command, place, "--out", tmp_path / "out")
    assert (tmp_path / "out/IMAGE-overlay.png").exists()
    assert (tmp_path / "out/metrics.json").exists() == ("--masks" in command)


@pytest.mark.parametrize("command", commands_of("python -m experiments") + commands_of("python plan"))
def test_every_other_command_is_understood(command, monkeypatch, capsys):
    """In this process, as to start a program takes longer."""
    words = shlex.split(command.partition("python ")[2])  # without the variables in front of it
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with pytest.raises(SystemExit) as ended:
        if words[0] == "-m":
            monkeypatch.delitem(sys.modules, words[1], raising=False)  # else Python warns
            runpy.run_module(words[1], run_name="__main__")
        else:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    assert ended.value.code == 0
    asked = set(re.findall(r"--[a-z-]+", command))
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert asked <= known


# Examples

@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_every_example_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(EXAMPLES[number], {})


def test_the_example_that_segments_an_array_gives_its_mask_and_probabilities(place, monkeypatch):
    monkeypatch.chdir(place)
    names = {}
    exec(example_with("import segment"), names)
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
    example = example_with("class Down")
    code += f"sys.path.insert(0, {str(tmp_path / 'only decompose.py')!r})\n{example}"
    (tmp_path / "alone.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": ""}
    result = subprocess.run([sys.executable, "alone.py"], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


# Names, lengths and links

def test_the_readme_tells_the_right_length_of_the_lesson():
    for name in LESSON:
        lines = (ROOT / name).read_text().count("\n")
        assert re.search(rf"\[`{name}`\]\({name}\)\s+\({lines}\b", README), f"{name}: {lines}"


def test_the_pages_name_every_script_and_experiment():
    everything = ""
    for page in PAGES:
        everything += page.read_text()
    for path in [*ROOT.glob("support/*.py"), *ROOT.glob("experiments/*.py"), ROOT / "predict.py", ROOT / "plan.py"]:
        assert re.search(rf"(`|^ *){path.name}(`| )", everything, re.MULTILINE), path


def test_every_link_leads_somewhere_and_every_picture_is_small():
    for page in PAGES:
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for name in re.findall(r"\]\(([^)#]+)\)", prose):
            if name.startswith("https:"):
                continue
            path = page.parent / name
            assert path.exists(), f"{page.name}: {name}"
            if path.suffix in (".png", ".gif"):
                assert path.stat().st_size < 500_000, path
