"""Where documents come from. Every source gives its documents in any order, by number.

Files without random access (.gz, .zst, Parquet) are unpacked once into the user's cache. Every line of JSON is read
once, when its index is made, so that a damaged file is refused before training and not in the middle of it.
"""

from __future__ import annotations

import array
import bisect
import dataclasses
import functools
import glob
import hashlib
import importlib
import itertools
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.weights._files import progress_bar, writing
from qwen_jax.weights.default_model import cache_folder
from train.data.config import SourceConfig
from train.data.corpora import corpus_file

JSON_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet",)
ARRAY_RECORD_SUFFIXES = (".array_record", ".arrayrecord")
TEXT_SUFFIXES = tuple(
    f".{name}"
    for name in """txt md rst tex html xml csv json yaml toml ini css sql sh py pyi ipynb js jsx ts tsx java kt scala c
    h cc cpp hpp cu cs go rs rb php pl lua r jl swift dart hs ml ex erl clj vue""".split()
)
COMPRESSED_SUFFIXES = (".gz", ".zst")
_SHOW_PROGRESS_ABOVE = 1 << 28  # bytes


class Repository(NamedTuple):
    """A repository-level document: (path, text) of each file, in order."""

    name: str
    files: tuple[tuple[str, str], ...]


Document = str | Repository


class Source(Protocol):
    """Documents by number, as grain's random access sources."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Document: ...


def open_source(config: SourceConfig) -> Source:
    """The documents of one source.

    Raises InputError when nothing is there, a file is damaged, a record lacks its text, or no document remains.
    """
    source = _open(config)
    if not len(source):
        raise InputError(f"{config.path} holds no documents; give a file or folder with text.")
    source[0]  # a wrong field or encoding is said now
    return source


def _open(config: SourceConfig) -> Source:
    if config.path.startswith("corpus:"):
        file = corpus_file(config.path.removeprefix("corpus:"), config.split)
        return _open(dataclasses.replace(config, path=str(file), format="jsonl", text_field="text"))
    if config.format == "hf":
        return HuggingFace(config)
    path = Path(config.path)
    if config.repo_level and path.is_dir() and config.format in ("auto", "text"):
        folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and folder.name[0] != ".")
        if folders:
            return TextFiles([(folder, _text_files(folder)) for folder in folders], config)
    files = _find_files(config.path)
    kind = _format_of(files, config)
    if kind == "text":
        if path.is_dir():
            files = _text_files(path)
        return TextFiles([(file, [file]) for file in files], config)
    if kind == "arrayrecord":
        return ArrayRecords([file for file in files if file.name.endswith(ARRAY_RECORD_SUFFIXES)], config)
    suffixes = JSON_SUFFIXES if kind == "jsonl" else PARQUET_SUFFIXES
    if path.is_dir():
        files = [file for file in files if _plain_name(file).endswith(suffixes)]
    return JsonLines(files, config, convert=_unpacked if kind == "jsonl" else functools.partial(_from_parquet, config))


def _find_files(path: str) -> list[Path]:
    if any(char in path for char in "*?["):
        files = [Path(name) for name in sorted(glob.glob(path, recursive=True)) if os.path.isfile(name)]
        if not files:
            raise InputError(f"no file matches {path}; check the pattern (** crosses folders).")
        return files
    if not os.path.exists(path):
        raise InputError(f"{path} does not exist; give a file, a folder or a pattern, or format 'hf' for the hub.")
    if os.path.isfile(path):
        return [Path(path)]
    files = _files_below(Path(path))
    if not files:
        raise InputError(f"{path} holds no documents; give a file or folder with text.")
    return files


def _files_below(folder: Path) -> list[Path]:
    """In order, without what is hidden."""
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    return [file for file in found if not any(part[0] == "." for part in file.relative_to(folder).parts)]


def _text_files(folder: Path) -> list[Path]:
    return [file for file in _files_below(folder) if _plain_name(file).endswith(TEXT_SUFFIXES)]


def _plain_name(file: Path) -> str:
    return file.stem if file.suffix in COMPRESSED_SUFFIXES else file.name


def _format_of(files: Sequence[Path], config: SourceConfig) -> str:
    """The one format of `files`. A folder's readme and scripts do not count where there are data files."""
    if config.format != "auto":
        return config.format
    known = {"jsonl": JSON_SUFFIXES, "parquet": PARQUET_SUFFIXES, "arrayrecord": ARRAY_RECORD_SUFFIXES}
    found = [kind for kind, suffixes in known.items() if any(_plain_name(file).endswith(suffixes) for file in files)]
    if len(found) > 1:
        raise InputError(f"{config.path} mixes {' and '.join(found)} files; give format, or one pattern for each.")
    if not found and not any(_plain_name(file).endswith(TEXT_SUFFIXES) for file in files):
        raise InputError(
            f"{config.path} has no file of a known type (.jsonl, .parquet, .array_record, .txt and others of text, "
            "with .gz or .zst); give format."
        )
    return found[0] if found else "text"


def _document(record: Any, config: SourceConfig, place: str) -> Document:
    """The document in a record. Raises InputError naming `place` when it is not there."""
    if not isinstance(record, Mapping):
        raise InputError(f"{place} is {type(record).__name__} and not an object with a field {config.text_field!r}.")
    if config.repo_level:
        try:
            files = tuple((_text(file["path"], place), _text(file["content"], place)) for file in record["files"])
            return Repository(_text(record["repo_name"], place), files)
        except (KeyError, TypeError):
            raise InputError(
                f"{place} is no repository: it needs repo_name, and files as a list of path and content."
            ) from None
    if config.text_field not in record:
        fields = ", ".join(map(str, record)) or "none"
        raise InputError(f"{place} has no field {config.text_field!r} (it has: {fields}); name one with text_field.")
    return _text(record[config.text_field], place)


def _text(text: Any, place: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"{place}: the text is {type(text).__name__} and not a string; name another text_field.")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"{place} has half a surrogate pair, which UTF-8 cannot hold; repair the text.") from None
    return text


# --- Files in the cache -----------------------------------------------------------------------------------------------


def _cached(file: Path, ending: str, make: Callable[[IO[bytes]], None]) -> Path:
    """A file made once from `file` in the user's cache; another content or another `ending` is another file."""
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns} {ending}".encode()).hexdigest()[:16]
    target = cache_folder() / "data" / f"{file.name}-{key}"
    if not target.exists():
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as out:
                make(out)
            partial.rename(target)
        finally:
            partial.unlink(missing_ok=True)
    return target


def _unpacked(file: Path) -> Path:
    """`file`, or its content in the cache when it is compressed. Raises InputError when it is damaged."""
    if file.suffix not in COMPRESSED_SUFFIXES:
        return file
    return _cached(file, "unpacked", lambda out: out.writelines(_decompressed(file)))


def _decompressed(file: Path) -> Iterator[bytes]:
    new, damage = _decoder(file.suffix)
    decoder, started = new(), False
    with file.open("rb") as raw, _progress(f"unpacking {file.name}", file) as advance:
        try:
            while chunk := raw.read(1 << 16):
                advance(len(chunk))
                while chunk:  # a file may hold several streams, one after the other
                    yield decoder.decompress(chunk)
                    started, chunk = not decoder.eof, decoder.unused_data
                    if decoder.eof:
                        decoder = new()
        except damage as error:
            raise InputError(f"{file} is damaged ({error}); copy or download it again.") from None
    if started:
        raise InputError(f"{file} is damaged (it ends too early); copy or download it again.")


def _decoder(suffix: str) -> tuple[Callable[[], Any], type[Exception]]:
    if suffix == ".gz":
        return functools.partial(zlib.decompressobj, wbits=31), zlib.error
    try:
        import zstandard
    except ImportError:
        raise InputError("reading .zst files needs zstandard; run: pip install 'qwen-jax[train]'.") from None
    return lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError


def _from_parquet(config: SourceConfig, file: Path) -> Path:
    """The fields that are needed, as lines of JSON in the cache."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError("reading Parquet needs pyarrow; run: pip install 'qwen-jax[train]'.") from None
    fields = ["repo_name", "files"] if config.repo_level else [config.text_field]

    def convert(out: IO[bytes]) -> None:
        try:
            with pyarrow.parquet.ParquetFile(file) as table, _progress(f"unpacking {file.name}", file) as advance:
                if missing := [field for field in fields if field not in table.schema_arrow.names]:
                    names = ", ".join(table.schema_arrow.names)
                    raise InputError(f"{file} has no column {missing[0]!r} (it has: {names}); name one of these.")
                for batch in table.iter_batches(columns=fields):
                    advance(file.stat().st_size * batch.num_rows // table.metadata.num_rows)
                    out.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in batch.to_pylist())
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{file} is not a Parquet file, or damaged ({reason}); copy it again.") from None

    return _cached(file, " ".join(fields), convert)


def _progress(description: str, file: Path) -> Any:
    size = file.stat().st_size
    return progress_bar(description, size, show=size > _SHOW_PROGRESS_ABOVE and sys.stderr.isatty())


# --- Lines of JSON ----------------------------------------------------------------------------------------------------


class JsonLines:
    """One document per line. `convert` makes a file readable by offsets, in the cache where it must."""

    def __init__(self, files: Sequence[Path], config: SourceConfig, convert: Callable[[Path], Path]) -> None:
        self._names, self._config = files, config
        self._files = [convert(file) for file in files]
        self._indices = [_line_index(file, name, config) for file, name in zip(self._files, self._names, strict=True)]
        self._ends = list(itertools.accumulate(len(index) for _, index in self._open))

    @functools.cached_property
    def _open(self) -> list[tuple[int, np.ndarray]]:
        """Of each file a descriptor, and the [N, 2] array of where its lines start and end."""
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
        descriptor, lines = self._open[number]
        start, end = map(int, lines[index - self._ends[number]])  # counted from the file's end, so below 0
        line = os.pread(descriptor, end - start, start)
        return _document(json.loads(line), self._config, f"{self._names[number]}, byte {start}")


def _line_index(file: Path, name: Path, config: SourceConfig) -> Path:
    """A .npy file in the cache: int64 [N, 2], where each line that is not blank starts and ends.

    Raises InputError with the file's `name` and the line number when a line is not a usable record.
    """
    fields = ("repository",) if config.repo_level else ("text", config.text_field)

    def make(out: IO[bytes]) -> None:
        borders, at = array.array("q"), 0
        with file.open("rb") as lines, _progress(f"indexing {name.name}", file) as advance:
            for number, line in enumerate(lines, start=1):
                advance(len(line))
                if line.strip():
                    place = f"{name}, line {number}"
                    try:
                        record = json.loads(line)
                    except ValueError as error:
                        reason = error.msg if isinstance(error, json.JSONDecodeError) else "it is not UTF-8"
                        raise InputError(f"{place} is not valid JSON ({reason}); repair or remove it.") from None
                    _document(record, config, place)
                    borders.extend((at, at + len(line)))
                at += len(line)
        np.save(out, np.frombuffer(borders, np.int64).reshape(-1, 2))

    return _cached(file, f"index {fields}", make)


# --- Other formats ----------------------------------------------------------------------------------------------------


class TextFiles:
    """One document per file, or per folder where documents are repositories."""

    def __init__(self, groups: Sequence[tuple[Path, Sequence[Path]]], config: SourceConfig) -> None:
        self._groups = [(path, files) for path, files in groups if files]
        self._config = config

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Document:
        path, files = self._groups[index]
        if not self._config.repo_level:
            return _read_text(path)
        return Repository(path.name, tuple((file.relative_to(path).as_posix(), _read_text(file)) for file in files))


def _read_text(file: Path) -> str:
    try:
        return _unpacked(file).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text (at byte {error.start}); convert it or leave it out.") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}); check the file.") from None


class ArrayRecords:
    """One document per record, each a JSON object as in a line of .jsonl."""

    def __init__(self, files: Sequence[Path], config: SourceConfig) -> None:
        import grain

        try:
            self._records: Any = grain.sources.ArrayRecordDataSource([str(file) for file in files])
            self._length = len(self._records)
        except ImportError:
            raise InputError("reading ArrayRecord needs array_record; run: pip install array_record.") from None
        except Exception as error:  # the C++ side raises what it likes
            reason = str(error).splitlines()[0]
            raise InputError(f"{config.path} is not ArrayRecord, or damaged ({reason}); copy it again.") from None
        self._config = config

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Document:
        place = f"{self._config.path}, record {index + 1}"
        try:
            record = json.loads(self._records[index])
        except ValueError:
            raise InputError(f"{place} is not a JSON object; write records as lines of .jsonl are written.") from None
        return _document(record, self._config, place)


class HuggingFace:
    """Rows of a Hugging Face data set: a folder of `save_to_disk`, or anything `load_dataset` takes."""

    def __init__(self, config: SourceConfig) -> None:
        try:
            datasets = importlib.import_module("datasets")
        except ImportError:
            raise InputError("format 'hf' needs the package datasets; run: pip install datasets.") from None
        try:
            if any((Path(config.path) / name).is_file() for name in ("state.json", "dataset_dict.json")):
                loaded = datasets.load_from_disk(config.path)
                self._rows = loaded[config.split] if isinstance(loaded, datasets.DatasetDict) else loaded
            else:
                self._rows = datasets.load_dataset(config.path, split=config.split)
        except Exception as error:  # the hub, the network and every builder raise their own
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(
                f"the data set {config.path}, split {config.split}, cannot be loaded ({reason}); check both names."
            ) from None
        self._config = config

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Document:
        return _document(self._rows[index], self._config, f"{self._config.path}, row {index}")
