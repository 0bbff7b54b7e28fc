"""Every experiment runs, in its smoke version."""

import json

import pytest

from experiments import benchmark, idea, qualitative


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
    assert {row["model"] for row in rows} == set(benchmark.CONTESTANTS) and {row["size"] for row in rows} == {32, 64}
    peak = {row["model"]: row["peak_mib"] for row in rows if row["size"] == 64}
    assert peak["decomposed, recompute"] < peak["decomposed"] == pytest.approx(peak["plain U-Net"], rel=0.2)
    assert (tmp_path / "runs/benchmark-quick/benchmark.png").exists()
