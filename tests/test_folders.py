"""Two runs never write to the same folder, and a run that cannot begin makes none."""

from multiprocessing.pool import ThreadPool
from pathlib import Path
from threading import Barrier

import pytest
from test_folder import make_folder

import train
from support.options import train_parser
from support.run import make_folder as make_folder_of_run
from support.run import prepare_run

pytestmark = pytest.mark.usefixtures("no_pictures")
TINY = "--width 2 --depth 1 --comm-channels 0 --train-images 8 --batch-size 8 --epochs 1".split()


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path, monkeypatch):
    """The working directory, where nothing is."""
    monkeypatch.chdir(tmp_path)


def prepare(*options) -> Path:
    """The folder that a run with these options gets."""
    _, out, _ = prepare_run([*TINY, *options], train_parser())
    return out


def message_of_failure(*options, capsys) -> str:
    """The one line with which train.py ends, with status 2."""
    with pytest.raises(SystemExit) as stopped:
        train.main([*TINY, *options])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.count("\n") == 1
    return said


def test_of_many_that_want_a_new_folder_at_the_same_instant_each_gets_its_own():
    config = {"out": None, "data": None, "grid": (2, 2), "comm_channels": 0, "seed": 0}
    barrier = Barrier(8)

    def make(thread):
        barrier.wait()
        return make_folder_of_run(config)

    with ThreadPool(8) as pool:
        for _ in range(20):
            assert len(set(pool.map(make, range(8), chunksize=1))) == 8


def test_a_run_is_named_after_its_data():
    make_folder(Path("nuclei"), 6)
    out = prepare("--dataset", "folder", "--data", "nuclei", "--grid", "1x2")
    assert out == Path("runs/nuclei-1x2-k0-seed0")


def test_a_folder_that_is_there_is_not_written_to(capsys):
    Path("here").mkdir()
    Path("here/best.pt").write_text("precious")
    assert "File exists: 'here'" in message_of_failure("--out", "here", capsys=capsys)
    assert list(Path("here").iterdir()) == [Path("here/best.pt")]
    assert Path("here/best.pt").read_text() == "precious"


def test_no_folder_is_made_where_the_images_cannot_be_used(capsys):
    make_folder(Path("data"), 6)
    Path("data/train/images/3.png").write_text("no picture")
    said = message_of_failure("--dataset", "folder", "--data", "data", "--out", "here", capsys=capsys)
    assert "3.png: cannot be read" in said
    assert not Path("here").exists()
