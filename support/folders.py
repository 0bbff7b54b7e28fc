"""Folders to write to: named, claimed for one program alone, and taken away again where nothing was written."""

import itertools
import os
from pathlib import Path

from support import checkpoints
from support.image_files import DataError

# The run that made this file has the folder. It is removed once last.pt is there.
CLAIM = checkpoints.UNFINISHED + "run"


def check_folder(path: Path):
    """DataError: no files can be written there, even if it were made."""
    there = path
    while not there.exists():
        there = there.absolute().parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise DataError(f"--out {path}: cannot be written, because {there} is a file, or you may not write there; name "
                        "another --out")


def new_folder(name: str) -> Path:
    """Makes the folder `name`, or if that exists already, `name-2`, `name-3`, ...

    Of two programs that do this at the same time each gets a folder of its own, as only one of them can make it.
    """
    path = Path(name)
    for i in itertools.count(2):
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            path = Path(f"{name}-{i}")


def claim(folder: Path, again: bool):
    """From now on the folder, which is made if need be, belongs to this run. DataError: it is not
    empty, or belongs to another run. again: the run may be one that was killed and restarted, so an
    earlier claim is its own."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (folder / CLAIM).touch(exist_ok=again)
    except FileExistsError:
        raise DataError(f"--out {folder}: this folder is being used by a run that has just begun; name another one (or "
                        "remove it, if that run was killed)") from None
    for path in folder.iterdir():
        if not checkpoints.is_unfinished(path):
            give_back(folder)
            raise DataError(f"--out {folder}: this folder is not empty; name a new one, or go on with the run in it: "
                            f"--resume {folder}")


def give_back(folder: Path):
    """Takes the claim away, and the folder too if nothing was written to it."""
    (folder / CLAIM).unlink(missing_ok=True)
    remove_if_empty(folder)


def remove_if_empty(folder: Path):
    if folder.is_dir() and not os.listdir(folder):
        folder.rmdir()
