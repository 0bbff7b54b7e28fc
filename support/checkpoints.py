"""What is left on disk: files that appear whole or not at all, and checkpoints that are data and never code."""

import csv
import errno
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
    unfinished = path.with_name(".unfinished-" + path.name[-50:])  # a name has at most 255 bytes on most disks
    try:
        yield unfinished
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException as error:  # also Ctrl-C
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # as that of a full disk
            error.filename = str(path)
        raise


def save(path: Path, state: dict):
    """Writes a checkpoint."""
    buffer = io.BytesIO()  # torch.save into a file says nothing of use when the disk is full
    torch.save(state, buffer)
    with atomic_write(path) as unfinished:
        unfinished.write_bytes(buffer.getbuffer())


def load(path: Path, needs: tuple[str, ...] = ("config", "model")) -> dict:
    """What `save` wrote, with its tensors on the CPU.

    path: of the file, or of the folder of a run, which stands for its best.pt; needs: the entries that it must have.
    CheckpointError: the file is damaged, lacks an entry, or holds anything but data. OSError: it cannot be read.
    """
    if path.is_dir():
        path = path / "best.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in as many ways as there are places in it
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which is what PyTorch says of half a file
            raise
        raise CheckpointError(f"{path}: cannot be loaded: it is damaged, or no checkpoint, or holds code, which is "
                              "not run; name a checkpoint that train.py wrote") from None
    if not isinstance(state, dict) or not set(needs) <= state.keys():
        raise CheckpointError(f"{path}: holds no {' and '.join(needs)}; name a checkpoint that train.py wrote")
    return state


def write_json(path: Path, content: dict):
    """Writes a JSON file. JSON has no nan and no infinity, so they become null."""
    text = json.dumps(content)
    content = json.loads(text, parse_constant=as_null)
    with atomic_write(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n")


def as_null(constant: str) -> None:
    """What to read instead of NaN or Infinity."""
    return None


def write_log(path: Path, rows: list[dict]):
    """Writes a CSV file, a line for each row. All rows have the same entries."""
    with atomic_write(path) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
