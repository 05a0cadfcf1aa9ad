"""Values from other people's files: JSON that is read safely, and entries of the kind and size they should have."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError

MAX_SIZE = 2**31 - 1  # of anything that counts: XLA indexes with 32 bits
MAX_LAYERS = 10_000
MAX_JSON_BYTES = 1 << 28  # the index of a model with 100,000 tensors has 10 MB

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60


def shown(value: object) -> str:
    """`value` for a sentence: its repr, shortened."""
    return _REPR.repr(value)


def printable(name: str) -> str:
    """A name out of a file for a sentence: as it is, unless it is long or holds control characters."""
    return name if name.isprintable() and len(name) < 120 else shown(name)


def whole(name: str, value: object, *, least: int = 1, most: int = MAX_SIZE) -> int:
    """`value` if it is an int from `least` to `most`. Raises InputError with `name` and value if not."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        limit = f"at least {least}" if isinstance(value, bool) or not isinstance(value, int) or value < least else ""
        limit = limit or f"at most {most}"
        raise InputError(f"{name} is {shown(value)}; it must be a whole number of {limit}, so correct the file.")
    return value


def number(name: str, value: object, *, least: float | None = None, most: float = 3e38) -> float:
    """`value` as a float if it is a number from `least` (without one, above 0) to `most`. Raises InputError if not."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not (value > 0 if least is None else value >= least)
        or value > most
    ):
        limit = "above 0" if least is None else f"of at least {least:g}"
        raise InputError(
            f"{name} is {shown(value)}; it must be a number {limit} and at most {most:g}, so correct the file."
        )
    return float(value)


def flag(name: str, value: object) -> bool:
    """`value` if it is true or false itself. Raises InputError with `name` and value if not."""
    if not isinstance(value, bool):
        raise InputError(f"{name} is {shown(value)}; it must be true or false, so correct the file.")
    return value


def mapping(name: str, value: object) -> Mapping[str, Any]:
    """`value` if it is a JSON object. Raises InputError with `name` and value if not."""
    if not isinstance(value, Mapping):
        raise InputError(f"{name} is {shown(value)}; it must be a mapping of keys to values, so correct the file.")
    return value


def read_text(path: Path, *, most: int = MAX_JSON_BYTES) -> str:
    """The content of a text file. Raises InputError when it is missing, unreadable, too large or not UTF-8."""
    try:
        if path.stat().st_size > most:
            raise InputError(f"{path} has {path.stat().st_size} bytes, too many for such a file of a model.")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path, or download the file.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({os.strerror(error.errno or 0).lower()}); check the file.") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text in UTF-8; download it again.") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises InputError as `read_text` does, or when it is not JSON, nested too deeply, or gives one key two values.
    """
    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise InputError(f"{path} is nested too deeply to be a JSON file of a model; download it again.") from None
    except ValueError as error:  # among them the limit on digits of a number
        raise InputError(f"{path} is not valid JSON ({error}); download it again.") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file. Raises InputError as `read_json` does."""
    return {**mapping(str(path), read_json(path))} if path.exists() else {}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError(f"key {shown(key)} is both {shown(found[key])} and {shown(value)}")
        found[key] = value
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
