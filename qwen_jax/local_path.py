"""Paths of this machine: those that users give, for nothing reads or writes object stores yet, and the cache's."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from tyro.constructors import PrimitiveConstructorSpec

from qwen_jax.errors import InputError


def local_path(path: str | Path) -> Path:
    """`path` as a Path. Raises InputError for gs://, s3:// and the like: `gs:` would become a folder."""
    if scheme := re.match(r"([A-Za-z][\w+.-]+):/", str(path)):
        raise InputError(
            f"{path} lies in no file system of this machine, and {scheme[1]}:// is not read or written yet; "
            "copy it, or mount it, and give a local path."
        )
    return Path(path)


def cache_folder() -> Path:
    """Where we keep downloads and what is compiled: $XDG_CACHE_HOME/qwen-jax, by default ~/.cache/qwen-jax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen-jax"


# what a field of a command's options is declared as
LocalPath = Annotated[
    Path,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: local_path(words[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    ),
]
