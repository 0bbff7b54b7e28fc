"""A run that is killed and resumed ends as if it had never been interrupted.

    KILLS=100 python -m pytest tests/test_resume.py          # as many kills at random instants as you like; default 3
"""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing.pool import ThreadPool

import pytest
import torch
from conftest import ROOT

import train
from support import checkpoints, processes

pytestmark = pytest.mark.usefixtures("no_pictures")
OPTIONS = "--width 2 --depth 2 --comm-channels 4 --dropout 0.2 --train-images 32 --epochs 6 --batch-size 4 --seed 3".split()


def contents(run):
    """Weights of both checkpoints, everything else of last.pt that the next step depends on, and the log without times."""
    best, last = checkpoints.load(run / "best.pt")["model"], checkpoints.load(run / "last.pt")
    rows = [{name: text for name, text in row.items() if "seconds" not in name} for row in csv.DictReader(open(run / "log.csv"))]
    tensors = [*best.values(), *last["model"].values(), last["order"], *last["random"],
               *(x for state in last["optimizer"]["state"].values() for x in state.values())]
    return tensors, rows, last["schedule"]["last_epoch"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    started = time.perf_counter()
    train.main([*OPTIONS, "--out", str(out)])
    return contents(out), time.perf_counter() - started


def epochs_logged(run) -> int:
    return max(len((run / "log.csv").read_text().splitlines()) - 1, 0) if (run / "log.csv").exists() else 0


def test_a_run_killed_at_any_instant_and_resumed_is_the_run_never_interrupted(tmp_path, uninterrupted):
    (tensors, rows, steps), seconds = uninterrupted
    unfinished = 0

    def run_and_kill(kill):
        out, chance = tmp_path / str(kill), random.Random(kill)
        run = subprocess.Popen([sys.executable, ROOT / "train.py", *OPTIONS, "--out", out], stdout=subprocess.DEVNULL)
        epoch = kill % 5 + 1 if kill < 5 else chance.randrange(6)  # then at any instant of it
        while run.poll() is None and (epochs_logged(out) < epoch or not (out / "last.pt").exists()):
            time.sleep(0.002)
        time.sleep(chance.uniform(0, seconds / 20))
        run.send_signal(signal.SIGKILL)
        run.wait()
        return out

    for kill, out in enumerate(ThreadPool(2).imap(run_and_kill, range(int(os.environ.get("KILLS", 3))))):
        done = len(checkpoints.load(out / "last.pt")["rows"])
        unfinished += done < 6
        train.main(["--resume", str(out)])
        mine = contents(out)
        assert all(torch.equal(a, b) for a, b in zip(mine[0], tensors, strict=True)), f"killed after {done} epochs"
        assert mine[1:] == (rows, steps) and not list(out.glob("*.unfinished*"))
        print(f"kill {kill + 1}: after {done} epochs, resumed to equal weights and log")
    assert unfinished >= 2  # the others had come to their end


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "evaluate", interrupted)
    with pytest.raises(SystemExit) as stopped:
        train.main([*OPTIONS, "--epochs", "1", "--out", str(tmp_path / "run")])
    assert stopped.value.code == 130 and f"python train.py --resume {tmp_path / 'run'}" in capsys.readouterr().err
    monkeypatch.undo()
    train.main(["--resume", str(tmp_path / "run")])
    assert "0 of 1 epochs are done" in capsys.readouterr().out and (tmp_path / "run/metrics.json").exists()


def fails(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        train.main([str(word) for word in arguments])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    return said


def test_a_loss_that_is_no_number_stops_the_run_and_the_last_good_epoch_stays(tmp_path, monkeypatch, capsys):
    said = fails([*OPTIONS, "--lr", "1e30", "--out", tmp_path / "a"], capsys)
    assert "at step" in said and "of epoch 1: the likely cause is --lr 1e+30" in said and not (tmp_path / "a/best.pt").exists()
    true_loss, calls = train.batch_loss, []

    def loss_that_breaks(*arguments):
        calls.append(1)
        return true_loss(*arguments) * (torch.nan if len(calls) == 19 else 1)  # third step of the third epoch
    monkeypatch.setattr(train, "batch_loss", loss_that_breaks)
    assert "the loss became nan at step 3 of epoch 3" in fails([*OPTIONS, "--out", tmp_path / "b"], capsys)
    last = checkpoints.load(tmp_path / "b/last.pt")
    assert len(last["rows"]) == 2 and all(weight.isfinite().all() for weight in last["model"].values())


def test_a_disk_that_fills_up_leaves_the_previous_checkpoint(tmp_path, capfd):
    """No file may grow beyond 20 kB for a while: the second checkpoint fails, as on a full disk."""
    out = tmp_path / "run"
    code = ("import resource, signal, train; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from support import checkpoints; true, saved = checkpoints.save, []\n"
            "def save(path, state):\n"
            "    saved.append(path)\n"
            "    if len(saved) == 4: resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
            "    true(path, state)\n"
            f"checkpoints.save = save; train.main({[*OPTIONS, '--epochs', '2', '--out', str(out)]!r})")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "File too large" in result.stderr, result.stderr
    assert len(checkpoints.load(out / "last.pt")["rows"]) == 1 and not list(out.glob("*.unfinished*"))
    train.main(["--resume", str(out)])


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("name, content, message", [
    ("missing", None, "holds no last.pt"), ("truncated", lambda whole: whole[:len(whole) // 2], "damaged"),
    ("empty", lambda whole: b"", "damaged"), ("text", lambda whole: b"hello", "damaged"),
    ("of another program", {"state_dict": {}}, "holds no config"), ("a list", [1, 2], "holds no config"),
    ("code", {"config": Code(), "model": {}}, "holds code, which is not run")])
def test_a_checkpoint_that_cannot_be_used_is_named_and_its_code_never_run(
        name, content, message, tmp_path, monkeypatch, capsys, uninterrupted):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    if callable(content):
        torch.save({"config": {}, "model": torch.zeros(100)}, run / "last.pt")
        (run / "last.pt").write_bytes(content((run / "last.pt").read_bytes()))
    elif content is not None:
        torch.save(content, run / "last.pt")
    before = {path: path.read_bytes() for path in run.iterdir()}
    assert str(run) in (said := fails(["--resume", run], capsys)) and message in said
    assert {path: path.read_bytes() for path in run.iterdir()} == before and not (tmp_path / "ran").exists()


def test_weights_that_do_not_fit_their_configuration_are_named(tmp_path, capsys):
    train.main([*OPTIONS, "--epochs", "1", "--out", str(tmp_path / "run")])
    state = checkpoints.load(tmp_path / "run/last.pt")
    for change, message in (({"config": state["config"] | {"width": 4}}, "its weights do not fit its configuration"),
                            ({"config": {}}, "another version of train.py"), ({"model": {}}, "another version of train.py"),
                            ({"optimizer": {}}, "what it holds does not go together"),
                            ({"config": state["config"] | {"train_images": 99}}, "the images have changed")):
        checkpoints.save(tmp_path / "run/last.pt", state | change)
        capsys.readouterr()
        assert message in fails(["--resume", tmp_path / "run"], capsys)


def test_resume_goes_alone(tmp_path, capsys):
    assert "give it alone" in fails(["--resume", tmp_path, "--epochs", 3], capsys)


def test_a_restart_goes_on_with_the_run_it_was_and_with_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processes, "CAN_RESTART", True)
    once = [*OPTIONS, "--epochs", "1", "--out", tmp_path / "run"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.unfinished-last.pt").touch()  # what a power cut left of a first try
    for said in ("epoch  train loss", "1 of 1 epochs are done"):
        train.main([str(word) for word in once])
        assert said in capsys.readouterr().out
    assert "holds a run with another lr, another seed" in fails([*once, "--seed", 4, "--lr", 0.1], capsys)
    assert "give --out" in fails(OPTIONS, capsys)
    monkeypatch.setattr(processes, "REMEMBERS", True)
    assert "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in fails(once, capsys)


def test_without_epochs_the_network_is_only_evaluated(tmp_path):
    train.main([*OPTIONS, "--epochs", "0", "--out", str(tmp_path / "run")])
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"best.pt", "last.pt", "metrics.json", "predictions.png"}
