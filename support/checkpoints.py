"""What a run leaves on disk: files that appear whole or not at all, and checkpoints that are data and never code."""

import csv
import errno
import io
import json
import os
from contextlib import contextmanager
from pathlib import Path

import torch

UNFINISHED = ".unfinished-"  # begins the name of a file that does not count


class CheckpointError(ValueError):
    """A checkpoint cannot be used. The message is one line that names the file and the fix."""


@contextmanager
def atomic_write(path: Path):
    """Gives the block another path to write to. Only when the block has ended well does that file
    take the place of what stood at `path`. Afterwards a power cut does not undo this."""
    unfinished = path.with_name(UNFINISHED + path.name)
    try:
        yield unfinished
        sync(unfinished)  # else the disk may know of the new name before it has the content
        os.replace(unfinished, path)
        sync(path.parent)
    except BaseException:  # also Ctrl-C
        unfinished.unlink(missing_ok=True)
        raise


def sync(path: Path):
    """Waits until the disk has the content of a file, or the names of the files in a folder. OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems, of networks for example, cannot do it for folders; then no more can be done.
        if not (path.is_dir() and error.errno == errno.EINVAL):
            raise
    finally:
        os.close(descriptor)


def is_unfinished(path: Path) -> bool:
    """Whether the file was left behind by a write that a power cut ended."""
    return path.name.startswith(UNFINISHED)


def save(path: Path, state: dict):
    """Writes a checkpoint. OSError: it cannot be written; then what stood there is still there."""
    buffer = io.BytesIO()  # torch.save into a file says nothing of use when the disk is full
    torch.save(state, buffer)
    with atomic_write(path) as unfinished:
        unfinished.write_bytes(buffer.getbuffer())


def load(path: Path, needs: tuple[str, ...] = ("config", "model")) -> dict:
    """What `save` wrote, with its tensors on the CPU.

    path: of the file, or of the folder of a run, which stands for its best.pt; needs: the entries that it must have.
    CheckpointError: the file is not there, is damaged, lacks an entry, or holds anything but data.
    """
    if path.is_dir():
        path = path / "best.pt"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; name a checkpoint that train.py wrote, runs/NAME/best.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in as many ways as there are places in it
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which is what PyTorch says of half a file
            error.filename = str(path)
            raise
        reason = "it is damaged, or no checkpoint"
        if "GLOBAL" in str(error):  # as PyTorch calls what is not data
            reason = "it holds code, which is not run"
        raise CheckpointError(f"{path}: cannot be loaded, {reason}; name a checkpoint that train.py wrote") from None
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
