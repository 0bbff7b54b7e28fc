"""Names of classes and files are text: whatever is in them, it is shown, printed and saved as it is."""

import csv
import io
import os
import sys

import numpy as np
import pytest
from matplotlib.cbook import is_math_text
from test_folder import make_folder, random_image, save
from test_predict import read_json, run

import train
from support import checkpoints, plots

NAMES = ["US$\\AU$", "_background_", "$\\frac{1", "100 % \"sure\", Straße"]
COLORS = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)]
SMALL = "--width 2 --depth 2 --comm-channels 4 --epochs 1 --batch-size 4 --grid 2x2".split()


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []

    def save_and_keep(figure, path):
        figure.savefig(path)
        figures.append(figure)

    monkeypatch.setattr(plots, "save", save_and_keep)
    return figures


def names_in(legend):
    """Its names as they are drawn, if none of them is taken for a formula."""
    names = []
    for text in legend.get_texts():
        assert not is_math_text(text.get_text())
        names.append(text.get_text().strip().replace("\\$", "$"))
    return names


def test_names_of_classes_are_not_taken_for_formulas_or_left_out_of_the_predictions(drawn, tmp_path):
    mask = np.zeros((8, 8), np.uint8)
    plots.draw_predictions(tmp_path / "some.png", {"image": [mask]}, [[]], NAMES, COLORS)
    (legend,) = drawn[0].legends
    assert names_in(legend) == NAMES


def test_names_of_classes_are_not_taken_for_formulas_or_left_out_of_the_curves(drawn, tmp_path):
    row = {"epoch": 1, "train_loss": 0.5, "val_loss": 0.4}
    for name in NAMES:
        row[f"val_iou_{name}"] = 0.5
    plots.draw_curves(tmp_path / "some.png", [row], NAMES, COLORS)
    _, right = drawn[0].axes
    assert names_in(right.get_legend()) == NAMES
    colors = [line.get_color() for line in right.get_legend().get_lines()]
    assert colors == COLORS


def test_names_of_classes_are_saved_in_log_and_metrics(tmp_path):
    row = {name: 0.5 for name in NAMES}
    checkpoints.write_log(tmp_path / "log.csv", [row])
    checkpoints.write_json(tmp_path / "metrics.json", row)
    with open(tmp_path / "log.csv", newline="", encoding="utf-8") as file:
        assert next(csv.reader(file)) == NAMES
    assert list(read_json(tmp_path / "metrics.json")) == NAMES


def test_names_of_files_in_old_bytes_are_printed_in_ascii_and_saved(tmp_path, monkeypatch, no_pictures):
    folder = tmp_path / os.fsdecode(b"stra\xdfe")  # in the bytes of Windows
    data = make_folder(folder / "data", 6)
    (data / "classes.txt").write_text("ground\nwater\nStraße\n", encoding="utf-8")
    for path in data.glob("train/*/3.png"):
        path.rename(path.with_name(os.fsdecode(b"\xe4.png")))
    image = save(folder / os.fsdecode(b"b\xe4r.png"), random_image((16, 24)))

    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    train.main([*SMALL, "--dataset", "folder", "--data", str(data), "--workers", "0", "--out", str(folder / "run")])
    assert run(folder / "run/best.pt", image, "--out", folder / "out") == 0
    sys.stdout.flush()
    assert b"Stra\\xdfe" in printed.getvalue()
    assert b"b\\udce4r.png is done" in printed.getvalue()
    assert (folder / "out" / image.name).exists()
    assert read_json(folder / "run/metrics.json")["config"]["data"] == str(data)
