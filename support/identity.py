"""Whether the images and masks of a run that goes on are those with which it was begun.

For this a run keeps two short texts. One stands for the names, the sizes and the times of the last
change of all files. It is compared first, and no file is read for that. Where it differs, as after
a move, the other one decides: it stands for the names of all files and for every byte in them. So
one thing would not be noticed: a file that was changed without a change of its size, and whose time
was then set back. Tools that copy files, such as rsync, trust in the same.
"""

import hashlib
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

from torch.utils.data import Dataset

from support.image_files import DataError
from support.image_folder import ImageFolder
from support.loaders import Loader
from support.options import show_progress


def all_files(folders: dict[str, ImageFolder]) -> list[tuple[str, Path]]:
    """(split, path) of all images and masks, each mask after its image."""
    files = []
    for split, folder in folders.items():
        for pair in folder.pairs:
            for path in pair:
                files.append((split, path))
    return files


def checksum(path: Path) -> int:
    """The checksum of a file, which is read 16 MiB at a time. DataError: it cannot be read."""
    value = 0
    try:
        with open(path, "rb") as file:
            block = file.read(2**24)
            while block:
                value = zlib.crc32(block, value)
                block = file.read(2**24)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); put it back") from None
    return value


class Checksums(Dataset):
    """The checksum of each file, for worker processes."""

    def __init__(self, files: list[tuple[str, Path]]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> int:
        _, path = self.files[i]
        return checksum(path)


def times_of(folders: dict[str, ImageFolder]) -> str:
    """Stands for the names, the sizes and the times of the last change of all files."""
    values = []
    for _, path in all_files(folders):
        status = path.stat()
        values.append((status.st_size, status.st_mtime_ns))
    return digest(folders, values)


def digest(folders: dict[str, ImageFolder], values: Iterable) -> str:
    """A short text that stands for the names of all files, and a value for each. The folder in
    which they all are may have any name. values: in the order of all_files; with checksums, the
    text stands for the contents of all files."""
    text = ""
    for (split, path), value in zip(all_files(folders), values, strict=True):
        text += f"{split} {path.name} {value}\n"
    return hashlib.sha256(os.fsencode(text)).hexdigest()


def read_contents(folders: dict[str, ImageFolder], workers: int) -> str:
    """The text that stands for the names and the contents of all files, which are read by this number of processes.

    DataError: a file cannot be read.
    """
    files = all_files(folders)
    checksums = []
    for value in Loader(Checksums(files), batch_size=None, num_workers=workers):
        checksums.append(value)
        show_progress(f"comparing file {len(checksums)} of {len(files)}")
    show_progress("")
    return digest(folders, checksums)
