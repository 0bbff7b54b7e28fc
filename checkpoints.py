"""What a run leaves on disk: files that appear whole or not at all, and checkpoints that are data and never code."""

import csv
import io
import json
import os
from contextlib import contextmanager
from pathlib import Path

import torch

UNFINISHED = ".unfinished-"  # a file that does not count


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: one line that names the file and the fix."""


@contextmanager
def whole_file(path: Path):
    """A path to write to. Only when the block ends well does it take the place of what stood at `path`."""
    unfinished = path.with_name(UNFINISHED + path.name)
    try:
        yield unfinished
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def is_unfinished(path: Path) -> bool:
    """Whether a power cut left it."""
    return path.name.startswith(UNFINISHED)


def save(path: Path, state: dict):
    """OSError: it cannot be written, and what stood there is still there."""
    buffer = io.BytesIO()  # torch.save into a file says nothing of use when the disk is full
    torch.save(state, buffer)
    with whole_file(path) as unfinished:
        unfinished.write_bytes(buffer.getbuffer())


def load(path: Path, needs: tuple[str, ...] = ("config", "model")) -> dict:
    """What `save` wrote, with its tensors on the CPU. CheckpointError: it is not there, is damaged, lacks one of the
    entries that it needs, or holds anything but data."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; name a checkpoint that train.py wrote, runs/NAME/best.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file fails in as many ways as there are places in it
        reason = "it holds code, which is not run" if "GLOBAL" in str(error) else "it is damaged, or no checkpoint"
        raise CheckpointError(f"{path}: cannot be loaded, {reason}; name a checkpoint that train.py wrote") from None
    if not isinstance(state, dict) or not set(needs) <= state.keys():
        raise CheckpointError(f"{path}: holds no {' and '.join(needs)}; name a checkpoint that train.py wrote")
    return state


def write_json(path: Path, content: dict):
    content = json.loads(json.dumps(content), parse_constant=lambda _: None)  # JSON has no nan
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n")


def write_log(path: Path, rows: list[dict]):
    with whole_file(path) as unfinished, open(unfinished, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
