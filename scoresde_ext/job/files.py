"""Files that are whole or not there, and a folder that has one owner."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL = ".partial"
LOCK = "lock"


def write_file(path: Path, write: Callable[[BinaryIO], Any], writer: str = "") -> str:
    """Puts a file under its name at once and for good: written under another name, synced, renamed, and the folder
    synced. ``writer`` tells those apart that may write the same file. Returns its SHA-256."""
    partial = path.with_name(f".{path.name}.{writer}{PARTIAL}")
    with open(partial, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    found = digest(partial)
    os.replace(partial, path)
    sync_folder(path.parent)
    return found


def write_folder(path: Path, write: Callable[[Path], Any], writer: str = "") -> str:
    """The same for a folder of files. One that stands there under this name is replaced."""
    partial = path.with_name(f".{path.name}.{writer}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    write(partial)
    for file in partial.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    sync_folder(partial)
    found = digest(partial)
    if path.exists():
        shutil.rmtree(path)
    os.replace(partial, path)
    sync_folder(path.parent)
    return found


def digest(path: Path) -> str:
    """SHA-256 of a file; of a folder, that of its files' names and their SHA-256."""
    found = hashlib.sha256()
    if path.is_dir():
        for file in sorted(path.iterdir()):
            found.update(f"{file.name} {digest(file)}\n".encode())
        return found.hexdigest()
    with open(path, "rb") as opened:
        while block := opened.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def size_of(path: Path) -> int:
    """In bytes; of a folder, that of its files."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.iterdir())
    return path.stat().st_size


def sync_folder(path: Path) -> None:
    """A name given or taken away lasts."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def remove_partials(folder: Path) -> None:
    """What killed jobs have left. For the owner of the folder alone."""
    for entry in os.scandir(folder):
        if entry.name.startswith(".") and entry.name.endswith(PARTIAL):
            remove(Path(entry.path))


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class FolderLock:
    """The folder is this process's until it ends, however it ends: the system holds the lock, not the file."""

    def __init__(self, folder: Path) -> None:
        self.file = open(folder / LOCK, "a")  # noqa: SIM115

    def acquire(self, wait: float) -> bool:
        """Whether it was to be had within ``wait`` seconds."""
        until = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() >= until:
                    return False
                time.sleep(0.05)

    def release(self) -> None:
        self.file.close()


def is_locked(folder: Path) -> bool:
    """Whether a job runs on the folder."""
    try:
        with open(folder / LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
