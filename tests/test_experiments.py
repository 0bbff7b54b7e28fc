"""Every experiment runs, in its smoke version."""

import gc
import json
from collections import Counter

import pytest
import torch
from conftest import CPU

import plan
import train
from comm_net import CommNet
from experiments import (benchmark, comm_channels, control, deepglobe, generalise, idea, loading, memory, norm,
                         qualitative, rare, reach, simulation)
from experiments.common import read_rows
from support import processes

pytestmark = pytest.mark.usefixtures("no_pictures")
SCRIPTS = [  # script, rows of its table of results, name of a score, what its Markdown table tells
    (reach, 8, "line_iou", "plain U-Net, depth 5"),
    (comm_channels, 3, "line", "| 2 | 8 | "),
    (control, 3, "line", "same network, no exchange"),
    (generalise, 13, "line", "| 256x256 | 8x8 | any two tiles |"),
    (deepglobe, 9, "mean_iou", "| 0.6680 |"),
    (memory, 7, "peak_mib", "| 128x128 |"),
    (norm, 6, "score", "| areas | 2 | plain U-Net, whole image |"),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, in which the experiments run."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def column_of_table(path, number: int) -> list[str]:
    """The cells of the first, second ... column of a Markdown table, with its heading and the line below that."""
    cells = []
    for line in path.read_text().splitlines():
        cells.append(line.split("|")[number].strip())
    return cells


def test_three_models_side_by_side_and_the_idea_in_one_picture(folder, monkeypatch, capsys):
    qualitative.main(["--quick"])
    assert "| with communication |" in capsys.readouterr().out
    results = folder / "runs/qualitative-quick"
    assert (results / "qualitative.png").exists()
    assert "IoU line" in (results / "table.md").read_text()

    monkeypatch.setattr(idea, "HERE", folder)
    idea.main(results / "with-seed0")
    assert (folder / "idea.png").exists()
    assert (folder / "problem.png").exists()


# The benchmark

ONE_SIZE = "--sizes 32 --grid 1x2 --width 2 --depth 1 --comm-channels 4 --rounds 1".split()


def everything_fits(config):
    """In place of plan.predict, which takes longer than the steps themselves."""
    return Counter(), Counter()


def one_gib(config):
    return Counter({"cpu:1": 2**30}), Counter()


def only_recompute_fits(config):
    bytes_needed = 0 if config["recompute"] else 2**60
    return Counter({"cpu:1": bytes_needed}), Counter()


def test_the_benchmark_ends_with_a_line_of_json(folder, monkeypatch, capsys):
    monkeypatch.setattr(plan, "predict", everything_fits)
    benchmark.main(["--quick"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    peaks = {row["model"]: row["peak_mib"] for row in rows}
    assert list(peaks) == list(benchmark.CONTESTANTS)
    assert peaks["recompute"] < peaks["decomposed"]
    assert peaks["decomposed"] == pytest.approx(peaks["plain U-Net"], rel=0.2)
    assert (folder / "runs/benchmark-quick/benchmark.png").exists()


def test_a_contestant_enters_if_the_machine_holds_what_is_predicted_for_it(monkeypatch):
    asked = benchmark.make_parser().parse_args("--grid 1x2 --width 2 --depth 1 --comm-channels 4".split())
    config = {**benchmark.make_config(asked), "image_size": (64, 64)}
    peak, _ = plan.predict(config)
    gib = peak["cpu:1"] / 2**30

    def slightly_more():
        return 1.1 * gib

    def slightly_less():
        return 0.9 * gib

    monkeypatch.setattr(processes, "memory_gib", slightly_more)
    assert benchmark.enter(config, CPU) is not None
    monkeypatch.setattr(processes, "memory_gib", slightly_less)
    assert benchmark.enter(config, CPU) is None


def test_a_contestant_that_does_not_fit_is_out_of_memory(folder, monkeypatch, capsys):
    monkeypatch.setattr(plan, "predict", only_recompute_fits)
    benchmark.main(ONE_SIZE)
    *lines, last = capsys.readouterr().out.splitlines()
    for line in lines:
        assert line.endswith("out of memory") == ("recompute" not in line)
    rows = json.loads(last)["rows"]
    assert rows[0]["seconds"] is None
    assert rows[-1]["seconds"] > 0
    assert rows[-1]["time_ratio"] is None  # as there is no time of the plain U-Net


def test_a_contestant_that_fitted_alone_but_not_beside_the_others_is_out_of_memory(folder, monkeypatch, capsys):
    """On a GPU all contestants keep their weights there."""
    seconds = benchmark.Contestant.seconds

    def no_room_for_the_plain_network(self):
        if self.config["comm_channels"] == 0:
            raise torch.OutOfMemoryError
        return seconds(self)

    monkeypatch.setattr(plan, "predict", everything_fits)
    monkeypatch.setattr(benchmark.Contestant, "seconds", no_room_for_the_plain_network)
    benchmark.main(ONE_SIZE)
    *lines, _ = capsys.readouterr().out.splitlines()
    for line in lines:
        assert line.endswith("out of memory") == ("plain U-Net" in line)


def test_a_size_that_cannot_be_cut_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["--sizes", "64"])
    assert "--sizes 64: 8 rows of tiles" in capsys.readouterr().err


def test_processes_exchange_their_gradients_once_coarse_maps_and_a_few_numbers(folder):
    benchmark.main(["--distributed", "--quick"])
    (row,) = read_rows(folder / "runs/distributed-quick/distributed.csv")
    assert row["processes"] == row["processes_of_an_image"] == 2

    # Beyond the gradients: 8 sums of the loss in float32; forwards and backwards a coarse map of 16
    # images, 4 channels and 8x8 cells; and in float64 the mean, the variance and the number of
    # steps of each layer of encoder and decoder.
    sums = 4 * 8
    coarse_map = 4 * 16 * 4 * 8 * 8
    channels = 2 * (2 + 4 + 8 + 16 + 8 + 4 + 2)
    layers = 2 * 7
    statistics = 8 * (2 * channels + layers)
    assert row["bytes_sent"] - row["bytes_of_weights"] == sums + 2 * coarse_map + statistics


def test_a_step_on_paper_is_told_for_each_number_of_gpus(folder, monkeypatch):
    smaller = "--width 2 --depth 1 --comm-channels 2 --batch-size 1 --recompute --amp"
    monkeypatch.setattr(simulation, "NETWORK", smaller.split())
    monkeypatch.setattr(plan, "predict", one_gib)
    simulation.main(["--quick"])
    table = folder / "runs/simulation-quick/simulation.md"
    assert column_of_table(table, 2) == ["GPUs", "---", "1", "2"]
    assert column_of_table(table, 8) == ["GiB of a GPU", "---", "1.0", "1.0"]


# Those of the loaders

def test_waiting_is_measured_for_each_number_of_workers(folder):
    loading.main(["--quick"])
    table = folder / "runs/loading-quick/loading.md"
    assert column_of_table(table, 1) == ["workers", "---", "0", "1", "2"]


# The object that is rare

def test_a_rare_object_is_looked_for_with_and_without_weights_of_the_classes(folder, monkeypatch):
    monkeypatch.setattr(rare, "IMAGES", {"train": 4, "val": 1, "test": 1})
    rare.main(["--quick", "--seeds", "0"])
    table = folder / "runs/rare-quick/rare-epochs1.md"
    assert column_of_table(table, 1) == ["class weights", "---", "all the same", "balanced"]


# Those that add to a file of results

FEWER = ["--train-images", "4"]


def draw_nothing(path, rows):
    pass


def make_smaller(script, monkeypatch):
    """Smoke runs learn from fewer synthetic images (of an option that is given twice, the second counts),
    and those of reach train fewer models."""
    if script is norm:
        monkeypatch.setitem(norm.QUICK_OPTIONS, "lines", norm.QUICK + FEWER)
    elif script in (comm_channels, control, generalise, reach):
        monkeypatch.setattr(script, "QUICK", script.QUICK + FEWER)
    if script is reach:
        monkeypatch.setitem(reach.GRIDS, "4x4", ["dilations 1 2 4, K 32", "plain U-Net, depth 5"])


@pytest.mark.parametrize("script, rows, score, told", SCRIPTS)
def test_a_quick_run_leaves_results_a_table_and_a_picture_and_makes_nothing_twice(script, rows, score, told, folder,
                                                                                   monkeypatch):
    make_smaller(script, monkeypatch)
    monkeypatch.setattr(memory, "GPUS", 0)
    script.main(["--quick"])
    name = script.__name__.split(".")[1]
    results = folder / f"runs/{name}-quick"
    csv = results / f"{name}.csv"
    scores = [row[score] for row in read_rows(csv)]
    assert len(scores) == rows
    assert min(scores) >= 0
    assert told in (results / f"{name}.md").read_text()
    assert (results / f"{name}.png").exists()

    before = csv.read_text()
    monkeypatch.setattr(train, "main", None)  # another training would fail
    monkeypatch.setattr(script, "draw", draw_nothing)
    script.main(["--quick"])
    assert csv.read_text() == before


@pytest.mark.parametrize("script", [comm_channels, control, generalise, deepglobe, memory, norm, reach])
def test_a_picture_can_be_drawn_before_there_are_results(script, tmp_path):
    script.draw(tmp_path / "empty.png", [])
    assert (tmp_path / "empty.png").exists()


def test_every_model_of_reach_that_is_drawn_has_a_colour_of_its_own():
    assert set(reach.COLORS) <= set(reach.MODELS)
    assert len(set(reach.COLORS.values())) == len(reach.COLORS)
    for names in reach.GRIDS.values():
        assert set(names) <= set(reach.MODELS)


def test_the_control_has_the_same_parameters_and_no_exchange():
    net = CommNet(3, dropout=0.0).eval()
    alone = control.Alone(3, dropout=0.0).eval()
    alone.load_state_dict(net.state_dict())
    before = torch.rand(1, 3, 8, 8)
    after = before.clone()
    after[..., :4, :4] = torch.rand(1, 3, 4, 4)  # another first tile
    last_tile = (..., slice(4, 8), slice(4, 8))
    assert not torch.equal(net(before)[last_tile], net(after)[last_tile])
    assert torch.equal(alone(before)[last_tile], alone(after)[last_tile])


@pytest.fixture
def one_gpu(monkeypatch):
    """experiments.memory believes in a GPU whose allocator always says 3 GiB. The steps are made on the CPU."""
    def nothing(device=None):
        pass

    def three_gib(device):
        return 3 * 2**30

    def name(device):
        return "a GPU"

    monkeypatch.setattr(memory, "GPUS", 1)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", nothing)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", three_gib)
    monkeypatch.setattr(torch.cuda, "get_device_name", name)
    monkeypatch.setattr(gc, "collect", nothing)  # slow in a process that has run many tests


def test_what_the_allocator_of_a_gpu_says_is_in_the_table(folder, one_gpu):
    memory.main(["--quick"])
    table = folder / "runs/memory-quick/memory.md"
    assert "| 128x128 | 3.00 | 3.00 | 3.00 | 3.00 |" in table.read_text()


def test_a_step_that_does_not_fit_is_a_value_in_the_table(folder, one_gpu, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(train, "batch_loss", full)
    memory.main(["--quick"])
    table = folder / "runs/memory-quick/memory.md"
    assert "| 128x128 | out of memory | out of memory | " in table.read_text()
