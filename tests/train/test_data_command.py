"""`qwen-jax data inspect`: its figures against a count by hand, its table, its refusals."""

from __future__ import annotations

import json

import pytest

from qwen_jax import cli
from tests.train.data_tools import byte_tokenizer, numbered_texts, write_jsonl


@pytest.fixture
def inspect(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    byte_tokenizer().save(tmp_path / "tokenizer")
    write_jsonl(tmp_path / "docs.jsonl", numbered_texts(200))
    write_jsonl(tmp_path / "more=2.jsonl", numbered_texts(50, name="m"))

    def run(*argv):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["data", "inspect", *map(str, argv), "--tokenizer", str(tmp_path / "tokenizer")])
        return stopped.value.code, *capsys.readouterr()

    return run


def test_figures(tmp_path, inspect):
    sources = [tmp_path / "docs.jsonl", f"{tmp_path}/more=2.jsonl=0.5"]
    code, out, _ = inspect(*sources, "--sequence-length", 64, "--batches", 5, "--batch-size", 4, "--json")
    report = json.loads(out)
    assert code == 0
    for row, texts, weight in zip(
        report["sources"], (numbered_texts(200), numbered_texts(50, name="m")), (1.0, 0.5), strict=True
    ):
        lengths = [len(text) + 1 for text in texts]  # a byte is a token, and each text has an end
        assert row["tokens"] == sum(lengths) and row["longest"] == max(lengths) and row["weight"] == weight
        assert row["documents"] == row["sampled"] == len(texts)
        assert row["characters_per_token"] == pytest.approx(sum(map(len, texts)) / sum(lengths))
    best_fit, concat = report["packing"]
    assert (best_fit["packing"], concat["packing"]) == ("best-fit", "concat")
    assert concat["filled"] == 1 and 0.8 < best_fit["filled"] <= 1
    assert best_fit["rows"] == concat["rows"] == 20
    for row in report["packing"]:  # what is not learned are the ends of documents
        ends = (row["filled"] - row["learned"]) * 64
        assert ends == pytest.approx(row["segments_per_row"] * (1 - row["cut"]), abs=0.01)
    assert len(report["samples"]) == 2
    assert sum(segment["tokens"] for segment in report["samples"][0]) <= 64


def test_table(tmp_path, inspect):
    code, out, _ = inspect(tmp_path / "docs.jsonl", "--sequence-length", 64, "--batches", 2)
    assert code == 0
    for words in ("characters/token", "best-fit", "concat", "tokens/s", "row 1, ", "<|endoftext|>"):
        assert words in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "nowhere does not exist"),
        ([], "needs at least one source"),
        (["docs.jsonl=-1"], "weight of docs.jsonl is -1"),
    ],
)
def test_refusals(inspect, argv, message):
    code, out, err = inspect(*argv)
    assert code == 2 and message in err and not out and err.count("\n") == 1


def test_only_inspect(capsys):
    for argv, code in ((["data", "look"], 2), (["data", "--help"], 0), (["data"], 0)):
        with pytest.raises(SystemExit) as stopped:
            cli.main(argv)
        assert stopped.value.code == code
    assert "there is no command 'data look'; there are inspect, shards, tokenizer." in capsys.readouterr().err
