"""Files that exist whole or not at all, and the progress bar that watches them grow."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from qwen_jax.errors import InputError
from qwen_jax.local_path import local_path


def new_folder(destination: Path) -> contextlib.AbstractContextManager[Path]:
    """A temporary sibling of `destination`, renamed to it when the block ends well and removed when it does not.

    What a killed process left is removed by the next one that writes the same destination. Raises InputError when
    `destination` exists, or when writing fails (a full disk).
    """
    return _new(destination, Path.mkdir, "folder")


def new_file(destination: Path) -> contextlib.AbstractContextManager[Path]:
    """As `new_folder`, for one file."""
    return _new(destination, Path.touch, "file")


@contextlib.contextmanager
def _new(destination: Path, make: Callable[[Path], None], what: str) -> Iterator[Path]:
    with writing(local_path(destination)):
        if destination.exists():
            raise InputError(f"{destination} already exists; choose another {what}, or remove it first.")
        destination.parent.mkdir(parents=True, exist_ok=True)
        for left in destination.parent.glob(f".{glob.escape(destination.name)}.*.partial"):
            with contextlib.suppress(BlockingIOError), _locked(left):
                _remove(left)
        temporary = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.partial")
        make(temporary)
        try:
            with _locked(temporary):
                yield temporary
                temporary.rename(destination)
        finally:
            _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock that ends with the process. Raises BlockingIOError when a living process holds it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(destination: Path) -> Iterator[None]:
    """Turns a failure to write into one sentence, and so the loss of a file that is read meanwhile."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno).lower() if error.errno else str(error)
        if error.errno in (errno.ENOENT, errno.EIO, errno.ESTALE) and _is_elsewhere(error.filename, destination):
            raise InputError(
                f"{error.filename} cannot be read ({reason}), so {destination} was not written; check the path, or "
                "download it again."
            ) from error
        advice = "free some space, or choose another disk" if error.errno == errno.ENOSPC else "choose another place"
        raise InputError(f"{destination} could not be written ({reason}), nothing was left there; {advice}.") from error


def _is_elsewhere(name: object, destination: Path) -> bool:
    """Whether a file that an error names is neither the destination, nor in it, nor what it is made from."""
    if not isinstance(name, str):
        return False
    path, parent = Path(name).absolute(), destination.absolute().parent
    if path == parent or path in parent.parents:
        return False
    inside = path.relative_to(parent).parts[0] if parent in path.parents else ""
    return inside != destination.name and not inside.startswith((f".{destination.name}.", "download-"))


@contextlib.contextmanager
def reading(source: Path) -> Iterator[None]:
    """Turns a failure to read into one sentence."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno).lower() if error.errno else str(error)
        raise InputError(f"{source} cannot be read ({reason}); check the path, or download it again.") from error


@contextlib.contextmanager
def progress_bar(description: str, total_bytes: int, *, show: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar on stderr with rate and time left; yields the function that advances it by a number of bytes."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = [
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    ]  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), disable=not show) as progress:
        task = progress.add_task(description, total=total_bytes)
        yield lambda count: progress.advance(task, count)
