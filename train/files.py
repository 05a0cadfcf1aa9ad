"""Files of a run that are whole at every moment, and the lease on its folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from qwen_jax.errors import EnvironmentFailed

RENEWED_EVERY, LOST_AFTER = 10.0, 60.0  # seconds


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """`path` as `write` fills it: beside, and renamed, so that a reader or a kill finds the old file or the new one.

    The one place to change where nothing can be renamed, as in an object store. Raises EnvironmentFailed when it cannot
    be written; the old file stays.
    """
    beside = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise EnvironmentFailed(
            f"{path} could not be written ({(error.strerror or str(error)).lower()}); "
            "free some space or repair the disk, then run the same command again."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


class Appended:
    """A file that grows by whole records. Those that there is no room for wait until there is."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self.waiting = b""
        self.fault = ""
        """Why they wait."""

    def write(self, record: bytes) -> None:
        self.waiting += record
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("ab", buffering=0)
            whole = os.fstat(self._file.fileno()).st_size
            try:
                rest = memoryview(self.waiting)
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError:
                self._file.truncate(whole)
                raise
            self.waiting = b""
        except OSError as error:
            self.fault = (error.strerror or str(error)).lower()

    def close(self) -> None:
        if self.waiting:
            self.write(b"")
        if self._file is not None:
            self._file.close()


class Lease:
    """The right to write in a folder, of one process at a time, also among hosts that share a disk.

    On a host, and where the file system knows locks among hosts, it is a lock of the file `.lease`, which ends with the
    process. Elsewhere it is the file's content, which its owner renews: one that nobody has renewed for LOST_AFTER
    seconds of the reader's own clock is taken over. Raises EnvironmentFailed when another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lease"
        self._owner = {"host": socket.gethostname(), "process": os.getpid(), "token": secrets.token_hex(8)}
        self._ended = threading.Event()
        self.lost = False
        """Whether another process has taken the lease over, because this one did not renew it in time."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise EnvironmentFailed(f"{folder} cannot be written ({error.strerror}); choose another folder.") from error
        try:
            self._take()
        except OSError as error:
            os.close(self._file)
            raise EnvironmentFailed(f"{self._path} cannot be written ({error.strerror}); free some space.") from error
        except EnvironmentFailed:
            os.close(self._file)
            raise
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def _take(self) -> None:
        before, locked = self._read(), True
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._held(before) from None
        except OSError:
            locked = False  # a file system without locks: only the content counts
        if before and not (locked and before.get("host") == self._owner["host"]):
            until = time.monotonic() + LOST_AFTER
            while time.monotonic() < until:
                time.sleep(min(1.0, LOST_AFTER / 10))
                if (now := self._read()) != before:
                    raise self._held(now)
        self._write(self._owner | {"renewed": 0})

    def _held(self, owner: dict[str, Any]) -> EnvironmentFailed:
        return EnvironmentFailed(
            f"another run, process {owner.get('process')} on {owner.get('host')}, is at work in {self._path.parent}; "
            "wait for its end, or choose another `out`."
        )

    def _renew(self) -> None:
        count = 0
        while not self._ended.wait(RENEWED_EVERY):
            count += 1
            try:
                if self._read().get("token") != self._owner["token"]:
                    self.lost = True
                    return
                self._write(self._owner | {"renewed": count})
            except OSError:
                continue  # a disk that is away for a while; the next renewal may do

    def _read(self) -> dict[str, Any]:
        """The content, or nothing where it is empty or being written."""
        try:
            return json.loads(os.pread(self._file, 4096, 0))
        except ValueError:
            return {}

    def _write(self, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        os.pwrite(self._file, text.ljust(512), 0)  # of one length, so that no renewal is seen half

    def release(self) -> None:
        """Gives the folder up."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        if not self.lost:
            os.ftruncate(self._file, 0)
        os.close(self._file)
