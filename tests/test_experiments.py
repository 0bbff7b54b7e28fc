"""Every experiment runs, in its smoke version."""

import json

import pytest
import torch

import plan
import train
from comm_net import CommNet
from experiments import benchmark, comm_channels, control, deepglobe, generalise, idea, memory, norm, qualitative, reach
from experiments.common import read

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_three_models_side_by_side_and_the_idea_in_one_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    qualitative.main(["--quick"])
    assert "| with communication |" in capsys.readouterr().out
    folder = tmp_path / "runs/qualitative-quick"
    assert (folder / "qualitative.png").exists() and "IoU line" in (folder / "table.md").read_text()
    monkeypatch.setattr(idea, "HERE", tmp_path)
    idea.main(folder / "with-seed0")
    assert (tmp_path / "idea.png").exists() and (tmp_path / "problem.png").exists()


def test_the_benchmark_ends_with_a_line_of_json(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    benchmark.main(["--quick"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert {row["model"] for row in rows} == set(benchmark.CONTESTANTS)
    peak = {row["model"]: row["peak_mib"] for row in rows if row["size"] == 64}
    assert peak["recompute"] < peak["decomposed"] == pytest.approx(peak["plain U-Net"], rel=0.2)
    assert (tmp_path / "runs/benchmark-quick/benchmark.png").exists()


def test_a_contestant_that_does_not_fit_is_out_of_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "predict", lambda config: ({"cpu:1": 0 if config["recompute"] else 2**60}, {}))
    benchmark.main("--sizes 32 --grid 2x2 --width 2 --depth 2 --comm-channels 8 --rounds 1".split())
    said = capsys.readouterr().out.splitlines()
    assert [line.endswith("out of memory") for line in said[:-1]] == ["recompute" not in line for line in said[:-1]]
    assert json.loads(said[-1])["rows"][0]["seconds"] is None and json.loads(said[-1])["rows"][-1]["time_ratio"] is None


def test_processes_exchange_their_gradients_once_and_the_sums_of_the_loss(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    benchmark.main(["--distributed", "--quick"])
    rows = read(tmp_path / "runs/distributed-quick/distributed.csv")
    assert [(row["processes"], row["bytes_sent"] - row["bytes_of_weights"]) for row in rows] == [(2, 32)]


def test_a_size_that_cannot_be_cut_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["--sizes", "64"])
    assert "--sizes 64: 8 rows of tiles" in capsys.readouterr().err


@pytest.mark.parametrize("script, rows, score, told", [
    (reach, 60, "line_iou", "plain U-Net, depth 5"), (comm_channels, 3, "line", "| 2 | 8 | "),
    (control, 3, "line", "same network, no exchange"), (generalise, 13, "line", "| 256x256 | 8x8 | any two tiles |"),
    (deepglobe, 9, "mean_iou", "| 0.6680 |"), (memory, 14, "peak_mib", "| 128x128 |"),
    (norm, 12, "score", "| areas | 2 | plain U-Net, whole image |")])
def test_a_quick_run_leaves_results_a_table_and_a_picture_and_makes_nothing_twice(script, rows, score, told, tmp_path,
                                                                                   monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "GPUS", 0)
    script.main(["--quick"])
    name = script.__name__.split(".")[1]
    path = tmp_path / f"runs/{name}-quick" / name
    results = read(path.with_suffix(".csv"))
    assert len(results) == rows and all(row[score] >= 0 for row in results)
    assert told in path.with_suffix(".md").read_text() and path.with_suffix(".png").exists()
    made = path.with_suffix(".csv").read_text()
    monkeypatch.setattr(train, "main", None)
    script.main(["--quick"])
    assert path.with_suffix(".csv").read_text() == made


@pytest.mark.parametrize("script", [comm_channels, control, generalise, deepglobe, memory, norm, reach])
def test_a_picture_can_be_drawn_before_there_are_results(script, tmp_path):
    script.draw(tmp_path / "empty.png", [])
    assert (tmp_path / "empty.png").exists()


def test_the_control_has_the_same_parameters_and_no_exchange():
    net, alone = CommNet(3, dropout=0.0).eval(), control.Alone(3, dropout=0.0).eval()
    alone.load_state_dict(net.state_dict())
    before, after = torch.rand(2, 1, 3, 8, 8)
    after[..., 4:, :] = before[..., 4:, :]
    after[..., 4:] = before[..., 4:]  # all but the first tile
    differ = [(model(before) != model(after))[..., 4:, 4:].any() for model in (net, alone)]
    assert differ == [True, False]


def test_a_step_that_does_not_fit_is_a_value_in_the_table(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.chdir(tmp_path)
    for name, value in (("reset_peak_memory_stats", id), ("max_memory_allocated", lambda device: 3 * 2**30)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(memory, "GPUS", 1)
    memory.main(["--quick"])
    table = tmp_path / "runs/memory-quick/memory.md"
    assert "| 128x128 | 3.00 | 3.00 | 3.00 | 3.00 |" in table.read_text()
    (tmp_path / "runs/memory-quick/memory.csv").unlink()
    monkeypatch.setattr(train, "batch_loss", full)
    memory.main(["--quick"])
    assert "| 128x128 | out of memory | out of memory | " in table.read_text()
