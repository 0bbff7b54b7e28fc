"""Two programs never write to the same folder, and a folder that was claimed and not used is taken away again."""

import fcntl
import os
import signal
import time
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
from test_image_folder import make_folder, save

import plan
import predict
import train
from support import folders
from support.command import prepare_run
from support.image_files import DataError
from support.options import make_parser, parse

pytestmark = pytest.mark.usefixtures("no_pictures")
TINY = "--width 2 --depth 1 --comm-channels 0 --train-images 8 --batch-size 8 --epochs 1".split()
RUN = "runs/synthetic-2x2-k0-seed0"  # the name that TINY gives


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path, monkeypatch):
    """The working directory, where nothing is."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepare(*options) -> Path:
    """The folder that a run with these options gets."""
    parser = make_parser("")
    parser.add_argument("--resume")
    _, out, _ = prepare_run([*TINY, *options], parser)
    return out


def message_of_failure(command, arguments, capsys) -> str:
    """The one line with which a command ends, with status 2."""
    with pytest.raises(SystemExit) as stopped:
        command([str(argument) for argument in arguments])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.count("\n") == 1
    return said


# Claimed

def test_two_runs_of_the_same_name_get_two_folders_before_either_has_written_anything():
    assert prepare() == Path(RUN)
    assert prepare() == Path(f"{RUN}-2")
    assert prepare("--lr", "0.1") == Path(f"{RUN}-3")


def test_two_folders_for_predictions_are_two_from_the_start():
    assert folders.new_folder("predictions") == Path("predictions")
    assert folders.new_folder("predictions") == Path("predictions-2")


def together(function, *arguments) -> list:
    """What function(*arguments) returns, or the DataError that it raises, in eight threads that
    begin at one instant."""
    barrier = Barrier(8)

    def call(thread):
        barrier.wait()
        try:
            return function(*arguments)
        except DataError as error:
            return error

    with ThreadPool(8) as pool:
        return pool.map(call, range(8))


def test_of_many_that_name_a_folder_at_the_same_instant_each_gets_its_own():
    for attempt in range(20):
        found = together(folders.new_folder, f"many-{attempt}")
        assert len(set(found)) == len(found)


def test_of_many_that_want_the_same_folder_at_the_same_instant_one_gets_it():
    for attempt in range(20):
        folder = Path(f"one-{attempt}")
        answers = together(folders.claim, folder)
        assert answers.count(None) == 1
        for answer in answers:
            assert answer is None or f"--out {folder}: another run is using this folder" in str(answer)


def test_the_second_run_with_the_same_out_is_one_line(capsys):
    assert prepare("--out", "here") == Path("here")
    said = message_of_failure(train.main, [*TINY, "--out", "here"], capsys)
    assert "--out here: another run is using this folder; name another one" in said
    assert Path("here").is_dir()


def test_a_run_that_is_being_trained_cannot_go_on_beside_it(monkeypatch, capsys):
    said = []

    def resume_it(*arguments):
        monkeypatch.setattr(train, "evaluate", evaluate)
        said.append(message_of_failure(train.main, ["--resume", "here"], capsys))
        return evaluate(*arguments)

    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", resume_it)
    train.main([*TINY, "--out", "here"])
    assert "here: another program is training this run; wait until it ends, or stop it" in said[0]
    train.main(["--resume", "here"])  # now that it has ended


def test_a_file_that_is_removed_before_it_is_locked_holds_nothing(monkeypatch):
    """As by a program that ends between the two."""
    flock = fcntl.flock

    def remove_and_lock(*arguments):
        monkeypatch.setattr(fcntl, "flock", flock)
        (Path("here") / folders.CLAIM).unlink()
        flock(*arguments)

    Path("here").mkdir()
    monkeypatch.setattr(fcntl, "flock", remove_and_lock)
    assert folders.hold(Path("here"))
    assert not folders.hold(Path("here"))
    folders.give_back(Path("here"))


def test_who_was_killed_holds_nothing_and_neither_do_its_workers():
    told, tell = os.pipe()
    program = os.fork()
    if program == 0:
        try:
            folders.claim(Path("here"))
            worker = os.fork()  # as to read images
            if worker == 0:
                time.sleep(60)
            os.write(tell, str(worker).encode())
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(program, 0)
    worker = int(os.read(told, 100))
    folders.claim(Path("here"))
    folders.give_back(Path("here"))
    os.kill(worker, signal.SIGKILL)


def test_an_empty_folder_can_be_claimed_and_a_finished_run_leaves_no_claim():
    Path("here").mkdir()
    train.main([*TINY, "--out", "here"])
    assert not (Path("here") / folders.CLAIM).exists()
    assert (Path("here") / "metrics.json").exists()


def test_to_read_the_options_and_to_plan_claim_nothing(somewhere_else, monkeypatch):
    def predict_nothing(config):
        return Counter(), Counter()

    monkeypatch.setattr(plan, "predict", predict_nothing)
    parse(TINY, make_parser(""))
    plan.main([*TINY, "--image-size", "64", "--out", "here"])
    plan.main(TINY)
    assert list(somewhere_else.iterdir()) == []


def test_a_run_is_not_begun_among_its_images(capsys):
    make_folder(Path(), 6)
    said = message_of_failure(train.main, ["--dataset", "folder", "--data", "."], capsys)
    assert "--out runs: is inside --data, where it would be taken for images; name another --out" in said


# Given back

def test_a_folder_is_taken_away_after_an_error_in_the_look_at_the_images(capsys):
    make_folder(Path("data"), 6)
    Path("data/train/images/3.png").write_text("no picture")
    options = ["--dataset", "folder", "--data", "data"]
    assert "3.png: cannot be read" in message_of_failure(train.main, options, capsys)
    assert list(Path("runs").iterdir()) == []
    assert "3.png: cannot be read" in message_of_failure(train.main, [*options, "--out", "here"], capsys)
    assert not Path("here").exists()


@pytest.mark.parametrize("where", ["support.command.describe", "train.make_loaders"])
def test_a_folder_is_taken_away_after_ctrl_c_before_anything_was_written(where, monkeypatch):
    def interrupt(*arguments):
        assert Path(RUN).is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupt)
    with pytest.raises(SystemExit, match="130"):
        train.main(TINY)
    assert not Path(RUN).exists()


def test_what_a_run_has_written_stays_when_it_is_stopped(monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_epoch", interrupt)
    with pytest.raises(SystemExit, match="130"):
        train.main(TINY)
    assert [path.name for path in Path(RUN).iterdir()] == ["last.pt"]


def test_a_folder_of_predictions_is_made_and_taken_away_if_there_is_none(monkeypatch, capsys):
    train.main([*TINY, "--out", "run"])
    Path("broken.png").write_text("no picture")
    assert "broken.png" in message_of_failure(predict.main, ["run/best.pt", "broken.png"], capsys)
    assert not Path("predictions").exists()
    save(Path("image.png"), np.zeros((32, 32), np.uint8))
    for folder in ("predictions", "predictions-2"):
        predict.main(["run/best.pt", "image.png"])
        assert (Path(folder) / "image.png").exists()

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "predict_and_score", interrupt)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="130"):
        predict.main(["run/best.pt", "image.png"])
    assert capsys.readouterr().err == "\nstopped after 0 of 1 images\n"
    assert not Path("predictions-3").exists()
