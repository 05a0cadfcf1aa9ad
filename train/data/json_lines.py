"""Records of JSON, one to a line or the elements of an array, and Parquet by way of them."""

from __future__ import annotations

import array
import bisect
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from qwen_jax.errors import InputError
from train.data.cache import cached, progress
from train.data.config import SourceConfig
from train.data.records import Document, document_of

_BOM = b"\xef\xbb\xbf"
_READ = 1 << 20  # bytes of an array at a time
_ONE_OBJECT = 1 << 28  # bytes of a file that is one object, at most
_SPACE = " \t\r\n"


class JsonLines:
    """One document per record. `convert` makes a file readable by offsets, in the cache where it must."""

    def __init__(
        self, files: Sequence[Path], config: SourceConfig, convert: Callable[[Path], Path], unit: str = "line"
    ) -> None:
        self._names, self._config, self._unit = files, config, unit
        self._files = [convert(file) for file in files]
        self._indices = [_index(file, name, config, unit) for file, name in zip(self._files, self._names, strict=True)]
        self._ends = list(itertools.accumulate(len(index) for _, index in self._open))
        self.num_bytes = sum(file.stat().st_size for file in self._files)

    @functools.cached_property
    def _open(self) -> list[tuple[int, np.ndarray]]:
        """Of each file a descriptor, and the [N, 2] array of where its records start and end."""
        indices = (np.load(index, mmap_mode="r") for index in self._indices)
        return [(os.open(file, os.O_RDONLY), index) for file, index in zip(self._files, indices, strict=True)]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_open"}  # workers open their own

    def __del__(self) -> None:
        for descriptor, _ in vars(self).get("_open", ()):
            os.close(descriptor)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Document:
        number = bisect.bisect_right(self._ends, index)
        descriptor, borders = self._open[number]
        start, end = map(int, borders[index - self._ends[number]])  # counted from the file's end, so below 0
        row = index - (self._ends[number] - len(borders)) + 1
        place = f"{self._names[number]}, record {row} at byte {start}"
        if self._unit == "row":
            place = f"{self._names[number]}, row {row}"
        return document_of(_parse(os.pread(descriptor, end - start, start), place), self._config, place)


def _index(file: Path, name: Path, config: SourceConfig, unit: str) -> Path:
    """A .npy file in the cache: int64 [N, 2], where each record starts and ends.

    Where bad records are refused, raises InputError with the file's `name` and the line, row or element of the first.
    """
    check = config.on_bad_record == "refuse"
    fields = ("repository",) if config.repo_level else (config.messages_field, config.text_field)

    def make(out: IO[bytes]) -> None:
        borders = array.array("q")
        with file.open("rb") as stream, progress(f"indexing {name.name}", file) as advance:
            for place, start, record in _records(stream, str(name), unit):
                advance(len(record))
                if check:
                    document_of(_parse(record, place), config, place)
                borders.extend((start, start + len(record)))
        np.save(out, np.frombuffer(borders, np.int64).reshape(-1, 2))

    return cached(file, f"index {fields} {check}", make)


def _records(stream: IO[bytes], name: str, unit: str) -> Iterator[tuple[str, int, bytes]]:
    """(place, first byte, bytes) of each record: the elements of an array, the one object of a file, or lines."""
    start = stream.read(len(_BOM))
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{name} is UTF-16 and not UTF-8; convert it.")
    begin = len(_BOM) if start == _BOM else 0
    stream.seek(begin)
    first = next((line for line in stream if line.strip()), b"")
    stream.seek(begin)
    if first.lstrip().startswith(b"["):
        yield from _elements(stream, name, begin)
    elif first.lstrip().startswith(b"{") and not _is_json(first) and _is_json(stream.read(_ONE_OBJECT)):
        stream.seek(begin)
        yield name, begin, stream.read()
    else:
        stream.seek(begin)
        at = begin
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield f"{name}, {unit} {number}", at, line
            at += len(line)


def _elements(stream: IO[bytes], name: str, begin: int) -> Iterator[tuple[str, int, bytes]]:
    """Those of a JSON array, of which only one and what was read ahead is in memory."""
    # as Latin-1 a character is a byte, and what bounds an element is ASCII
    decoder, text, at, number, size = json.JSONDecoder(), "", 0, 0, _READ

    def more() -> bool:
        nonlocal text, at, begin, size
        new = stream.read(size).decode("latin-1")
        text, at, begin = text[at:] + new, 0, begin + at
        size *= 2
        return bool(new)

    def skip(characters: str) -> str:
        """The next character that is none of these, or nothing at the end."""
        nonlocal at
        while True:
            while at < len(text) and text[at] in characters:
                at += 1
            if at < len(text) or not more():
                return text[at : at + 1]

    skip(_SPACE)
    at += 1  # the bracket
    while (char := skip(_SPACE)) != "]":
        number += 1
        place = f"{name}, element {number}"
        if number > 1:
            if char != ",":
                raise InputError(f"{place} is not valid JSON (no comma before it); repair or remove it.")
            at += 1
            skip(_SPACE)
        while True:
            try:
                _, end = decoder.raw_decode(text, at)
                if end < len(text):  # else a number may go on
                    break
            except (ValueError, RecursionError):
                pass
            if not more():
                raise InputError(f"{place} is not valid JSON, or the file is cut off there; repair it.")
        yield place, begin + at, text[at:end].encode("latin-1")
        at, size = end, _READ
    at += 1
    if skip(_SPACE):
        raise InputError(f"{name} goes on after its array's end, which is not valid JSON; repair it.")


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parse(record: bytes, place: str) -> Any:
    try:
        return json.loads(record)
    except (ValueError, RecursionError) as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else "it is nested too deeply"
        reason = error.msg if isinstance(error, json.JSONDecodeError) else reason
        raise InputError(f"{place} is not valid JSON ({reason}); repair or remove it.") from None


def from_parquet(config: SourceConfig, file: Path) -> Path:
    """The fields that are needed, as lines of JSON in the cache."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError("reading Parquet needs pyarrow; run: pip install 'qwen-jax[train]'.") from None
    fields = ["repo_name", "files"] if config.repo_level else [config.messages_field or config.text_field]
    check = config.on_bad_record == "refuse"

    def line(row: int, batch: Any, index: int) -> bytes:
        """A record; where it cannot be one, what says so when it is read."""
        place, values = f"{file}, row {row + 1}", {}
        try:
            values = {field: batch.column(field)[index].as_py() for field in fields}
            return json.dumps(values, ensure_ascii=False).encode()
        except TypeError:
            kind = type(values[fields[-1]]).__name__
            reason = f"{place}: the text is {kind} and not a string; store it as a column of strings."
        except UnicodeError:
            reason = f"{place} is not UTF-8; repair or remove it."
        if check:
            raise InputError(reason)
        return json.dumps({field: None for field in fields}).encode()

    def convert(out: IO[bytes]) -> None:
        row = 0
        try:
            with pyarrow.parquet.ParquetFile(file) as table, progress(f"unpacking {file.name}", file) as advance:
                if missing := [field for field in fields if field not in table.schema_arrow.names]:
                    names = ", ".join(table.schema_arrow.names)
                    raise InputError(f"{file} has no column {missing[0]!r} (it has: {names}); name one of these.")
                for batch in table.iter_batches(columns=fields):
                    advance(file.stat().st_size * batch.num_rows // table.metadata.num_rows)
                    out.writelines(line(row + i, batch, i) + b"\n" for i in range(batch.num_rows))
                    row += batch.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{file} is not a Parquet file, or damaged ({reason}); copy it again.") from None

    return cached(file, f"{' '.join(fields)} {check}", convert)
