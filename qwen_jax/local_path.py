"""Paths that users give: of this machine, for nothing reads or writes object stores yet."""

from __future__ import annotations

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
