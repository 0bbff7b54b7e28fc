"""Folders to write to: named, claimed for one program alone, and taken away again where nothing was written."""

import fcntl
import itertools
import os
from pathlib import Path

from support import checkpoints
from support.image_files import DataError

CLAIM = checkpoints.UNFINISHED + "run"  # the program that has locked this file holds the folder
HELD = {}  # the folders that this program holds, and the descriptor of the file of each


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


def claim(folder: Path):
    """From now on the folder, which is made if need be, belongs to this run. DataError: it is not
    empty, or another program writes to it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not hold(folder):
        raise DataError(f"--out {folder}: another run is using this folder; name another one")
    for path in folder.iterdir():
        if not checkpoints.is_unfinished(path):
            give_back(folder)
            raise DataError(f"--out {folder}: this folder is not empty; name a new one, or go on with the run in it: "
                            f"--resume {folder}")


def hold(folder: Path) -> bool:
    """Makes sure that no other program holds the folder until `give_back`, or until this program ends, even if it is
    killed. Returns whether it could."""
    path = folder / CLAIM
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError:  # a file system that has no locks
            pass
        if is_at(descriptor, path):
            HELD[folder] = descriptor
            return True
        os.close(descriptor)  # a program that ended has just removed this file; another one may have made a new one


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one at this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def give_back(folder: Path):
    """Another program may now hold the folder. Takes it away if nothing was written to it."""
    descriptor = HELD.pop(folder, None)
    if descriptor is not None:
        (folder / CLAIM).unlink(missing_ok=True)
        os.close(descriptor)
    remove_if_empty(folder)


def let_go():
    """In a process that was forked, for example to read images: it must not hold a folder longer than this program."""
    for descriptor in HELD.values():
        os.close(descriptor)
    HELD.clear()


os.register_at_fork(after_in_child=let_go)


def remove_if_empty(folder: Path):
    if folder.is_dir() and not os.listdir(folder):
        folder.rmdir()
