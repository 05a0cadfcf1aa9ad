"""Where documents come from. Every source gives its documents in any order, by number.

Files without random access (.gz, .zst, Parquet) are unpacked once into the user's cache. Every record of JSON is read
once, when its index is made, so that a damaged file is refused before training and not in the middle of it.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import hashlib
import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.local_path import local_path
from train.data.cache import COMPRESSED_SUFFIXES, unpacked
from train.data.config import SourceConfig
from train.data.corpora import corpus_file
from train.data.json_lines import JsonLines, from_parquet
from train.data.records import BadRecord, Document, Repository, Source, document_of
from train.data.shards import INDEX, Shards

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIXES = (".parquet",)
ARRAY_RECORD_SUFFIXES = (".array_record", ".arrayrecord")
TEXT_SUFFIXES = tuple(
    f".{name}"
    for name in """txt md rst tex html xml csv json yaml toml ini css sql sh py pyi ipynb js jsx ts tsx java kt scala c
    h cc cpp hpp cu cs go rs rb php pl lua r jl swift dart hs ml ex erl clj vue""".split()
)


def open_source(config: SourceConfig) -> Source:
    """The documents of one source.

    Raises InputError when nothing is there, a file is damaged, a record lacks its text, or no document remains.
    """
    source = _open(config)
    if not len(source):
        raise InputError(f"{config.path} holds no documents; give a file or folder with text.")
    # a wrong field or encoding is said now
    if config.on_bad_record == "refuse":
        source[0]
        return source
    lenient = WithoutBad(source)
    if all(isinstance(lenient[index], BadRecord) for index in range(min(100, len(source)))):
        source[0]
    return lenient


def fingerprint(source: Source) -> str:
    """What a source holds, in a few characters: its number of documents and bytes, and documents spread over it."""
    if isinstance(source, Shards):
        return source.digest
    digest = hashlib.sha256(f"{len(source)} {getattr(source, 'num_bytes', None)}".encode())
    for index in np.linspace(0, len(source) - 1, min(64, len(source))).astype(int):
        digest.update(repr(source[int(index)]).encode())
    return digest.hexdigest()[:16]


def _open(config: SourceConfig) -> Source:
    if config.path.startswith("corpus:"):
        file = corpus_file(config.path.removeprefix("corpus:"), config.split)
        return _open(dataclasses.replace(config, path=str(file), format="jsonl", text_field="text"))
    if config.format == "hf":
        return HuggingFace(config)
    path = local_path(config.path)
    if config.format == "shards" or (config.format == "auto" and (path / INDEX).is_file()):
        return Shards(path)
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
    if path.is_dir():
        suffixes = JSON_SUFFIXES if kind == "jsonl" else PARQUET_SUFFIXES
        files = [file for file in files if _plain_name(file).endswith(suffixes)]
    if kind == "jsonl":
        return JsonLines(files, config, unpacked)
    return JsonLines(files, config, functools.partial(from_parquet, config), "row")


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
    """The one format of `files`. A folder's readme and scripts do not count where there are data files; `.json` is
    data, but one text among others where there are only files of text and code beside it."""
    if config.format != "auto":
        return config.format
    known = {"jsonl": JSON_SUFFIXES, "parquet": PARQUET_SUFFIXES, "arrayrecord": ARRAY_RECORD_SUFFIXES}
    names = [_plain_name(file) for file in files]
    if any(name.endswith(TEXT_SUFFIXES) and not name.endswith((".md", ".json")) for name in names):
        known["jsonl"] = tuple(suffix for suffix in JSON_SUFFIXES if suffix != ".json")
    found = [kind for kind, suffixes in known.items() if any(name.endswith(suffixes) for name in names)]
    if len(found) > 1:
        raise InputError(f"{config.path} mixes {' and '.join(found)} files; give format, or one pattern for each.")
    if not found and not any(name.endswith(TEXT_SUFFIXES) for name in names):
        raise InputError(
            f"{config.path} has no file of a known type (.jsonl, .json, .parquet, .array_record, .txt and others of "
            "text, with .gz or .zst); give format."
        )
    return found[0] if found else "text"


class WithoutBad:
    """A source with a BadRecord for each document that it cannot give."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Document:
        try:
            return self.source[index]
        except InputError:
            return BadRecord()


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
        return unpacked(file).read_bytes().decode("utf-8-sig")
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
        return document_of(record, self._config, place)


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
        return document_of(self._rows[index], self._config, f"{self._config.path}, row {index}")
