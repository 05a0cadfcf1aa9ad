"""Compiles kernels.c for this machine with the C compiler that there is, once, and keeps the result in the cache."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

SOURCE = Path(__file__).with_name("kernels.c")
# not -ffast-math, with which some compilers make a library that flushes subnormal numbers of the whole process
FLAGS = ("-O3", "-ffp-contract=fast", "-fno-math-errno", "-std=gnu11", "-shared", "-fPIC")


class Unavailable(Exception):
    """Why there are no native kernels here, as the middle of a sentence."""


def compiler() -> list[str]:
    """The command of $CC, cc, gcc or clang, or of the ziglang package. Raises Unavailable when there is none."""
    for command in (shlex.split(os.environ.get("CC", "")), ["cc"], ["gcc"], ["clang"]):
        if command and shutil.which(command[0]):
            return command
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]
    raise Unavailable("there is no C compiler (install gcc or clang, or `pip install ziglang`)")


def build(folder: Path, check: Callable[[Path], None], flags: Sequence[str] = ()) -> Path:
    """The shared library in `folder`, compiled there unless it is there already.

    A new one must pass `check` before it counts. What is found counts only with the checksum that was then written
    beside it, for a damaged library may end the process that loads it. Raises Unavailable.
    """
    command = compiler()
    is_arm = platform.machine() in ("arm64", "aarch64")
    flags = [*FLAGS, "-mcpu=native" if is_arm or "ziglang" in command else "-march=native", *flags]
    key = hashlib.sha256(
        repr((SOURCE.read_bytes(), _header(), command, flags, _version(command), _processor())).encode()
    )
    library = folder / f"{key.hexdigest()[:32]}.so"
    if _is_whole(library):
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_whole(library):  # another process may have made it meanwhile
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    made = Path(scratch) / library.name
                    _compile(command, flags, made, Path(scratch))
                    check(made)
                    made.replace(library)
                    checksum = made.with_suffix(".sha256")
                    checksum.write_text(_digest(library))
                    checksum.replace(library.with_suffix(".sha256"))
    except OSError as error:
        raise Unavailable(f"{folder} cannot be written ({os.strerror(error.errno or 0).lower()})") from error
    return library


def _compile(command: list[str], flags: Sequence[str], library: Path, scratch: Path) -> None:
    paths = ["-I", jax.ffi.include_dir(), str(SOURCE), "-o", str(library), "-lm"]
    environment = os.environ | {"ZIG_GLOBAL_CACHE_DIR": str(scratch), "ZIG_LOCAL_CACHE_DIR": str(scratch)}
    try:
        subprocess.run(
            [*command, *flags, *paths], env=environment, check=True, capture_output=True, text=True, timeout=600
        )
    except (subprocess.SubprocessError, OSError) as error:
        said = (getattr(error, "stderr", None) or "").strip().splitlines()
        lines = [line for line in said if "error" in line] or said[-1:]
        reason = lines[0].strip() if lines else f"exit status {getattr(error, 'returncode', 'none')}"
        raise Unavailable(f"`{shlex.join(command[:1])}` cannot compile them ({reason})") from None


def _header() -> bytes:
    return (Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_bytes()


def _version(command: list[str]) -> str:
    try:
        return subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (subprocess.SubprocessError, OSError):
        return ""


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    return "".join(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_whole(library: Path) -> bool:
    try:
        return library.with_suffix(".sha256").read_text() == _digest(library)
    except OSError:
        return False
