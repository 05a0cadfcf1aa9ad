"""Every format gives back the texts that were written, and what is damaged is named."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import zstandard
from array_record.python import array_record_module

from qwen_jax.errors import InputError
from tests.train.data_tools import write_jsonl
from train.data.config import SourceConfig
from train.data.records import Repository
from train.data.sources import fingerprint, open_source

TEXTS = ["one", "", "zwei\n\nZeilen", "三句话。", 'quote " and \\ and \u2028', "x" * 5000]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qwen-jax" / "data"


def texts_of(path, **options):
    source = open_source(SourceConfig(str(path), **options))
    backwards = [source[i] for i in reversed(range(len(source)))]
    copy = pickle.loads(pickle.dumps(source))
    assert backwards == [copy[i] for i in reversed(range(len(copy)))]
    return backwards[::-1]


def as_jsonl(texts, field="text") -> bytes:
    return "".join(json.dumps({field: text, "id": i}) + "\n" for i, text in enumerate(texts)).encode()


def test_jsonl(tmp_path, cache):
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_jsonl(TEXTS[:3]) + b"\n  \r\n" + as_jsonl(TEXTS[3:]).rstrip(b"\n"))
    assert texts_of(path) == TEXTS
    made = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert texts_of(path) == TEXTS
    assert {file: file.stat().st_mtime_ns for file in cache.iterdir()} == made  # the index is made once
    write_jsonl(path, ["another"])
    assert texts_of(path) == ["another"]


def test_compressed_jsonl(tmp_path):
    whole = as_jsonl(TEXTS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(whole[:40]) + gzip.compress(whole[40:]))  # two members
    (tmp_path / "b.jsonl.zst").write_bytes(b"".join(zstandard.compress(part) for part in (whole[:40], whole[40:])))
    assert texts_of(tmp_path / "a.jsonl.gz") == texts_of(tmp_path / "b.jsonl.zst") == TEXTS
    assert texts_of(tmp_path / "*.jsonl.*") == TEXTS * 2
    for name in ("a.jsonl.gz", "b.jsonl.zst"):
        data = (tmp_path / name).read_bytes()
        for damaged in (data[:-9], b"no" + data):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(InputError, match=f"{name} is damaged"):
                texts_of(tmp_path / name)


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
def test_json_is_lines_an_array_or_one_object(tmp_path, monkeypatch, bom):
    monkeypatch.setattr("train.data.json_lines._READ", 7)  # so that elements are cut wherever a part ends
    records = [{"text": text, "n": [i, {"a": "]},["}]} for i, text in enumerate(TEXTS)]
    dense = json.dumps(records, ensure_ascii=False, separators=(",", ":"))
    for number, text in enumerate((as_jsonl(TEXTS).decode(), dense, json.dumps(records, indent=2))):
        path = tmp_path / str(number) / "train.json"
        path.parent.mkdir()
        path.write_bytes(bom + text.encode())
        assert texts_of(path) == texts_of(path.parent) == TEXTS
        (tmp_path / f"{number}.json.gz").write_bytes(gzip.compress(bom + text.encode()))
        assert texts_of(tmp_path / f"{number}.json.gz") == TEXTS
    path = tmp_path / "one.json"
    path.write_bytes(bom + json.dumps(records[2], indent=2).encode())
    assert texts_of(path) == TEXTS[2:3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'[{"text": "a"}, {"text": "b', "element 2 is not valid JSON, or the file is cut off"),
        (b'[{"text": "a"} {"text": "b"}]', "element 2 is not valid JSON .no comma"),
        (b'[{"text": "a"}] x', "goes on after its array's end"),
        (b'[{"text": "a"}, 12]', "element 2 is int and not an object"),
        (b'[{"text": "a"}, {"text": "\xff"}]', "element 2 is not valid JSON .it is not UTF-8"),
        (b"[" * 100_000, "element 1 is not valid JSON"),
        ('[{"text": "a"}]'.encode("utf-16"), "is UTF-16"),
    ],
)
def test_a_bad_array_is_named(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_bytes(text)
    with pytest.raises(InputError, match=f"a.json,? {message}"):
        texts_of(path)


def test_json_beside_code_is_text(tmp_path):
    (tmp_path / "package.json").write_text('{"name": "x"}')
    (tmp_path / "main.py").write_text("a = 1")
    assert texts_of(tmp_path) == ["a = 1", '{"name": "x"}']
    assert texts_of(tmp_path, format="text") == ["a = 1", '{"name": "x"}']


def test_a_fingerprint_is_of_the_content(tmp_path):
    def of(path, **options):
        return fingerprint(open_source(SourceConfig(str(path), **options)))

    first = write_jsonl(tmp_path / "a.jsonl", ["alpha"] * 50)
    moved = write_jsonl(tmp_path / "b.jsonl", ["alpha"] * 50)
    other = write_jsonl(tmp_path / "c.jsonl", ["betas"] * 50)
    assert of(first) == of(moved) != of(other)
    first.write_text("".join(json.dumps({"text": "alpha", "note": "n"}) + "\n" for _ in range(50)))
    assert of(first, text_field="note") != of(first)


def test_parquet(tmp_path):
    table = pyarrow.table({"content": TEXTS, "n": range(len(TEXTS))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert texts_of(tmp_path / "a.parquet", text_field="content") == TEXTS
    with pytest.raises(InputError, match=r"a.parquet has no column 'text' \(it has: content, n\)"):
        texts_of(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="a.parquet, row 1: the text is int and not a string"):
        texts_of(tmp_path / "a.parquet", text_field="n")
    for name, array, message in (
        ("bytes", pyarrow.array([b"a", b"b"]), "row 1: the text is bytes and not a string"),
        ("none", pyarrow.array(["a", None]), "row 2: the text is NoneType"),
        ("utf", pyarrow.array([b"a", b"\xff"]).view(pyarrow.utf8()), "row 2 is not UTF-8"),
    ):
        pyarrow.parquet.write_table(pyarrow.table({"text": array}), tmp_path / f"{name}.parquet")
        with pytest.raises(InputError, match=f"{name}.parquet, {message}"):
            texts_of(tmp_path / f"{name}.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="b.parquet is not a Parquet file"):
        texts_of(tmp_path / "b.parquet")


def test_array_record(tmp_path):
    for name, part in (("a", TEXTS[:4]), ("b", TEXTS[4:])):
        writer = array_record_module.ArrayRecordWriter(str(tmp_path / f"{name}.array_record"), "group_size:1")
        for text in part:
            writer.write(json.dumps({"text": text}).encode())
        writer.close()
    assert texts_of(tmp_path) == TEXTS
    with pytest.raises(InputError, match="a.array_record, record 1 has no field 'body'"):
        texts_of(tmp_path / "a.array_record", text_field="body")
    (tmp_path / "c.array_record").write_bytes(b"no" * 1000)
    with pytest.raises(InputError, match="c.array_record is not ArrayRecord"):
        texts_of(tmp_path / "c.array_record")


def test_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"body": TEXTS})}).save_to_disk(tmp_path / "splits")
    assert texts_of(tmp_path / "one", format="hf") == TEXTS
    assert texts_of(tmp_path / "splits", format="hf", split="test", text_field="body") == TEXTS
    with pytest.raises(InputError, match="split train, cannot be loaded"):
        texts_of(tmp_path / "splits", format="hf")


def test_hugging_face_needs_its_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        open_source(SourceConfig("someone/something", format="hf"))


def test_text_folder(tmp_path):
    folder = tmp_path / "texts"
    (folder / "sub" / ".git").mkdir(parents=True)
    (folder / "a.txt").write_text(TEXTS[3], encoding="utf-8")
    (folder / "sub" / "b.py").write_bytes(b"a = 1\r\n")
    (folder / "sub" / "c.md.gz").write_bytes(gzip.compress(b"packed"))
    (folder / "image.png").write_bytes(b"\x89PNG")
    (folder / "sub" / ".git" / "config.txt").write_text("hidden")
    assert texts_of(folder) == [TEXTS[3], "a = 1\r\n", "packed"]
    assert texts_of(folder / "**" / "*.py") == ["a = 1\r\n"]
    assert texts_of(folder / "a.txt") == [TEXTS[3]]
    (folder / "d.jsonl").write_bytes(as_jsonl(["data"]))
    assert texts_of(folder) == ["data"]  # beside data files, readme and scripts are no data
    (folder / "e.parquet").write_bytes(b"")
    with pytest.raises(InputError, match="mixes jsonl and parquet"):
        texts_of(folder)


def test_repositories(tmp_path):
    for name, files in {"one": {"a.py": "A", "sub/b.py": "B"}, "two": {"c.py": "C"}, "empty": {}}.items():
        (tmp_path / "repos" / name).mkdir(parents=True)
        for path, text in files.items():
            (tmp_path / "repos" / name / path).parent.mkdir(exist_ok=True)
            (tmp_path / "repos" / name / path).write_text(text)
    expected = [Repository("one", (("a.py", "A"), ("sub/b.py", "B"))), Repository("two", (("c.py", "C"),))]
    assert texts_of(tmp_path / "repos", repo_level=True) == expected
    records = [
        {"repo_name": repo.name, "files": [{"path": path, "content": text} for path, text in repo.files]}
        for repo in expected
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert texts_of(tmp_path / "r.jsonl", repo_level=True) == expected
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "r.parquet")
    assert texts_of(tmp_path / "r.parquet", repo_level=True) == expected
    (tmp_path / "r.jsonl").write_text('{"repo_name": "x"}\n')
    with pytest.raises(InputError, match="line 1 is no repository"):
        texts_of(tmp_path / "r.jsonl", repo_level=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "is not valid JSON"),
        (b'{"text": "\xff"}', "is not valid JSON .it is not UTF-8"),
        (b'{"body": "x", "n": 1}', r"has no field 'text' \(it has: body, n\)"),
        (b'{"text": null}', "the text is NoneType"),
        (b'["x"]', "is list and not an object"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b"[" * 100_000, "is not valid JSON .it is nested too deeply"),
    ],
)
def test_a_bad_line_is_named(tmp_path, cache, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n" + b'{"text": "fine"}\n')
    with pytest.raises(InputError, match=f"a.jsonl, line 3:? .*{message}|a.jsonl, line 3:? {message}") as error:
        texts_of(path)
    assert "\n" not in str(error.value)
    assert list(cache.iterdir()) == []
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as file:
        file.write(path.read_bytes())
    with pytest.raises(InputError, match="b.jsonl.gz, line 3"):
        texts_of(tmp_path / "b.jsonl.gz")


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist"):
        texts_of(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no file matches"):
        texts_of(tmp_path / "*.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no documents"):
        texts_of(tmp_path / "empty")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match="holds no documents"):
        texts_of(tmp_path / "empty.jsonl")
    (tmp_path / "x.bin").write_bytes(np.arange(9).tobytes())
    with pytest.raises(InputError, match="no file of a known type"):
        texts_of(tmp_path / "x.bin")
