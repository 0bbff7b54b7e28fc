"""What is left on disk: files that appear whole or not at all, and checkpoints that are data and never code."""

import csv
import io
import json
import os
from contextlib import contextmanager
from pathlib import Path

import torch

from support.options import UserError


class CheckpointError(UserError):
    """A checkpoint cannot be used. The message is one line that names the file and the fix."""


@contextmanager
def atomic_write(path: Path):
    """Gives the block another path to write to. Only when the block has ended well does that file
    take the place of what stood at `path`, and its content is on the disk by then. OSError: it
    cannot be written; then what stood there is still there."""
    unfinished = path.with_name(".unfinished" + path.suffix)  # no longer than `path`, which may be as long as can be
    try:
        yield unfinished
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def save(path: Path, state: dict):
    """Writes a checkpoint."""
    buffer = io.BytesIO()  # torch.save into a file says nothing of use when the disk is full
    torch.save(state, buffer)
    with atomic_write(path) as unfinished:
        unfinished.write_bytes(buffer.getbuffer())


def load(path: Path) -> dict:
    """What `save` wrote, with its tensors on the CPU.

    path: of the file, or of the folder of a run, which stands for its best.pt.
    CheckpointError: the file is damaged, or no checkpoint, or holds anything but data. OSError: it cannot be read.
    """
    if path.is_dir():
        path = path / "best.pt"
    with open(path, "rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            if {"config", "model"} <= state.keys():
                return state
        except Exception:  # a damaged file fails in as many ways as there are places in it
            pass
    raise CheckpointError(f"{path}: is damaged, or no checkpoint of train.py, or holds code, which is not run; name "
                          "another one")


def write_json(path: Path, content: dict):
    """Writes a JSON file. JSON has no nan: where a score is none, it holds null."""
    text = json.dumps(content, indent=2).replace(": NaN", ": null")
    with atomic_write(path) as unfinished:
        unfinished.write_text(text + "\n")


def write_log(path: Path, rows: list[dict]):
    """Writes a CSV file, a line for each row. All rows have the same entries."""
    with atomic_write(path) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
