"""The loader: determinism, exact resume, shards, mixtures, length shares, errors."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from qwen_jax.errors import InputError
from tests.train.data_tools import assert_same, byte_tokenizer, numbered_texts, segments, write_jsonl
from train.data import packing
from train.data.config import DataConfig, LengthShare, SourceConfig
from train.data.loader import make_loader

TOKENIZER = byte_tokenizer()
END = TOKENIZER.special_tokens["<|endoftext|>"]


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(packing, "WINDOW_ROWS", 8)
    monkeypatch.setattr(packing, "WINDOW_TOKENS", 0)


@pytest.fixture
def config(tmp_path) -> DataConfig:
    file = write_jsonl(tmp_path / "docs.jsonl", numbered_texts(300))
    return DataConfig(sources=(SourceConfig(str(file)),), sequence_length=64, batch_size=4)


def take(config, count=None, **kwargs):
    with make_loader(config, TOKENIZER, **kwargs) as loader:
        return list(itertools.islice(loader, count))


def names(batches):
    """Of each document in the batches, in order, what stands before its colon. The batches hold whole documents."""
    text = TOKENIZER.decode(np.concatenate([segment for batch in batches for segment in segments(batch)]).tolist())
    return re.findall(r"([dm]\d+):", text)


@pytest.mark.parametrize("kind", ["best-fit", "concat"])
def test_one_epoch_holds_every_text_once_in_another_order(config, kind):
    batches = take(dataclasses.replace(config, packing=kind, epochs=1))
    assert all(batch["tokens"].shape == (4, 64) for batch in batches)
    ids = np.concatenate([segment for batch in batches for segment in segments(batch)])
    texts = numbered_texts(300)
    assert len(ids) == sum(len(text) + 1 for text in texts)
    assert (ids == END).sum() == 300
    found = names(batches)
    assert len(found) == 300 and set(found) == {text.split(":")[0] for text in texts}
    assert found != sorted(found, key=lambda name: int(name[1:]))


def test_without_shuffle_concat_keeps_the_order(config):
    batches = take(dataclasses.replace(config, packing="concat", epochs=1, shuffle=False))
    ids = np.concatenate([batch["tokens"][batch["segment_ids"] > 0] for batch in batches])
    assert TOKENIZER.decode(ids.tolist()) == "".join(f"{text}<|endoftext|>" for text in numbered_texts(300))


def test_the_last_batch_is_filled_with_padding(config):
    last = take(dataclasses.replace(config, packing="concat", epochs=1, batch_size=64))[-1]
    empty = (last["segment_ids"] == 0).all(axis=1)
    rows = -(-sum(len(text) + 1 for text in numbered_texts(300)) // 64)
    assert empty.sum() == -rows % 64 > 0
    assert (last["tokens"][empty] == TOKENIZER.pad_id).all() and not last["loss_mask"][empty].any()


@pytest.mark.parametrize("kind", ["best-fit", "concat"])
def test_same_seed_same_batches(config, kind):
    config = dataclasses.replace(config, packing=kind, fim_rate=0.5)
    first = take(config, 30)
    assert_same(first, take(config, 30))
    other = take(dataclasses.replace(config, seed=1), 30)
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(first, other, strict=True))


def test_epochs_have_orders_of_their_own(config):
    config = dataclasses.replace(config, packing="concat", epochs=2)
    found = names(take(config))
    assert len(found) == 600
    first, second = found[:300], found[300:]
    assert set(first) == set(second) and first != second


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["best-fit", "concat"])
def test_exact_resume_at_a_random_batch(tmp_path, config, kind, workers):
    more = write_jsonl(tmp_path / "more.jsonl", numbered_texts(90, seed=1, mean=200, name="m"))
    config = dataclasses.replace(
        config,
        sources=(*config.sources, SourceConfig(str(more), weight=2.0)),
        packing=kind,
        fim_rate=0.3,
        length_shares=() if workers else (LengthShare(0.25, min_tokens=64), LengthShare(0.75, max_tokens=64)),
    )
    whole = take(config, 40)  # in this process
    at = int(np.random.default_rng(len(kind) + workers).integers(1, 30))
    with make_loader(dataclasses.replace(config, num_workers=workers), TOKENIZER) as loader:
        assert_same([next(loader) for _ in range(at)], whole[:at])
        state = loader.get_state()
        next(loader)
        as_json, pickled = json.dumps(state), pickle.dumps(state)
        assert len(as_json) < 2000
        loader.set_state(json.loads(as_json))
        assert_same([next(loader) for _ in range(5)], whole[at : at + 5])
    with make_loader(config, TOKENIZER) as loader:  # a new one, in this process
        loader.set_state(pickle.loads(pickled))
        assert loader.get_state() == state
        assert_same([next(loader) for _ in range(10)], whole[at : at + 10])


def test_a_state_of_other_data_is_refused(tmp_path, config):
    with make_loader(config, TOKENIZER) as loader:
        state = loader.get_state()
    for change, message in (
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"sequence_length": 32}, "sequence_length was 64 and is now 32"),
        ({"packing": "concat"}, "packing was best-fit"),
    ):
        with make_loader(dataclasses.replace(config, **change), TOKENIZER) as loader:
            with pytest.raises(InputError, match=message):
                loader.set_state(state)
    texts = numbered_texts(300)
    for name, change in (("longer", {}), ("other", {}), ("field", {"text_field": "note"})):
        file = tmp_path / f"{name}.jsonl"
        written = [text.upper() if name == "other" else text for text in texts] + ["more"] * (name == "longer")
        file.write_text("".join(json.dumps({"text": text, "note": "n" * len(text)}) + "\n" for text in written))
        other = dataclasses.replace(config, sources=(SourceConfig(str(file), **change),))
        with (
            make_loader(other, TOKENIZER) as loader,
            pytest.raises(InputError, match="the saved place is of other data"),
        ):
            loader.set_state(state)
    copy = write_jsonl(tmp_path / "copy.jsonl", texts)  # the same texts elsewhere are the same data
    with make_loader(dataclasses.replace(config, sources=(SourceConfig(str(copy)),)), TOKENIZER) as loader:
        loader.set_state(state)


@pytest.mark.parametrize("kind", ["best-fit", "concat"])
def test_the_batches_are_the_same_from_any_number_of_processes(config, kind):
    """And a place that one process saved is a place for all of them."""
    config = dataclasses.replace(config, packing=kind, epochs=1, batch_size=6)
    whole = take(config)
    for count in (2, 3):
        of_each = [take(config, rows=range(index, 6, count)) for index in range(count)]
        assert {len(batches) for batches in of_each} == {len(whole)}
        for number, batch in enumerate(whole):
            for index in range(count):
                assert_same([of_each[index][number]], [{name: array[index::count] for name, array in batch.items()}])
    with make_loader(config, TOKENIZER) as loader:
        next(loader), next(loader)
        place = loader.get_state()
    with make_loader(config, TOKENIZER, rows=[1, 4]) as loader:
        loader.set_state(json.loads(json.dumps(place)))
        assert_same([next(loader)], [{name: array[[1, 4]] for name, array in whole[2].items()}])


def shares_of_tokens(batches):
    """Source -> share of the tokens, by the letter that each text begins with."""
    counts = {}
    for batch in batches:
        for segment in segments(batch):
            letter = TOKENIZER.decode(segment[:1].tolist())
            if letter.isalpha() and letter != "x":
                counts[letter] = counts.get(letter, 0) + len(segment)
    return {letter: count / sum(counts.values()) for letter, count in counts.items()}


def test_weights_are_shares_of_tokens(tmp_path):
    """Sources whose documents differ tenfold in length; every document fits a row, so each segment names its source."""
    sources = tuple(
        SourceConfig(str(write_jsonl(tmp_path / f"{name}.jsonl", numbered_texts(400, i, mean, name))), weight=weight)
        for i, (name, mean, weight) in enumerate([("a", 20, 7), ("b", 60, 2), ("c", 200, 1)])
    )
    config = DataConfig(sources=sources, sequence_length=2048, batch_size=4)
    shares = shares_of_tokens(take(config, 60))
    # an exponential's standard deviation is its mean, and c has about 120 of 400 documents here
    for name, expected in (("a", 0.7), ("b", 0.2), ("c", 0.1)):
        assert shares[name] == pytest.approx(expected, rel=0.25, abs=0.01), shares


def test_length_shares(tmp_path):
    texts = ["l" + "y" * 150, *("s" + "y" * 20 for _ in range(20))] * 20  # of 152 tokens: 64, 64 and 24
    file = write_jsonl(tmp_path / "docs.jsonl", texts)
    config = DataConfig(
        sources=(SourceConfig(str(file)),),
        sequence_length=64,
        batch_size=5,
        length_shares=(LengthShare(0.4, min_tokens=64), LengthShare(0.6, max_tokens=64)),
    )
    rows = [TOKENIZER.decode(row.tolist()) for batch in take(config, 40) for row in batch["tokens"]]
    assert sum("s" not in row.replace("<|endoftext|>", "") for row in rows) == 0.4 * len(rows)
    assert not any("l" in row.replace("<|endoftext|>", "") and "s" in row.replace("<|endoftext|>", "") for row in rows)


@pytest.mark.parametrize(("workers", "closes"), [(0, True), (1, False)])
def test_a_program_ends_cleanly_whether_it_closes_or_not(tmp_path, config, workers, closes):
    script = tmp_path / "script.py"
    script.write_text(
        f"""
from tests.train.data_tools import byte_tokenizer
from train.data.config import DataConfig, SourceConfig
from train.data.loader import make_loader

if __name__ == "__main__":
    sources = (SourceConfig({config.sources[0].path!r}),)
    config = DataConfig(sources, sequence_length=64, batch_size=4, num_workers={workers})
    loader = make_loader(config, byte_tokenizer())
    for _ in range(16):
        batch = next(loader)
    print(batch["tokens"].shape)
    if {closes}:
        loader.close()
"""
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, env=environment)
    assert (done.stdout, done.stderr, done.returncode) == ("(4, 64)\n", "", 0)


WORKERS = """
import multiprocessing, os, signal, sys, time
from tests.train.data_tools import byte_tokenizer
from train.data import packing
from train.data.config import DataConfig, SourceConfig
from train.data.loader import make_loader

if __name__ == "__main__":
    packing.WINDOW_ROWS, packing.WINDOW_TOKENS = 8, 0
    config = DataConfig((SourceConfig(sys.argv[1]),), sequence_length=64, batch_size=4, num_workers=1)
    loader = make_loader(config, byte_tokenizer())
    next(loader)
    (worker,) = multiprocessing.active_children()
    print(worker.pid, flush=True)
    input()
    if sys.argv[2] == "worker":
        os.kill(worker.pid, signal.SIGKILL)
        try:
            for _ in range(1000):
                next(loader)
        except Exception as error:
            print(type(error).__name__, error, flush=True)
"""


@pytest.mark.parametrize("killed", ["main", "worker"])
def test_kill_9(tmp_path, config, killed):
    """Of the main process: its workers end too. Of a worker: one sentence."""
    (tmp_path / "script.py").write_text(WORKERS)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    program = [sys.executable, tmp_path / "script.py", config.sources[0].path, killed]
    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout
        worker = int(process.stdout.readline())
        if killed == "worker":
            text, _ = process.communicate("\n")
            assert text.startswith("EnvironmentFailed a data worker ended"), text
            return
        process.kill()
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{worker}") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{worker}")


def test_bad_records_are_left_out_and_counted(tmp_path, config):
    """The same batches as without them."""
    texts = numbered_texts(300)
    lines = [json.dumps({"text": text}) for text in texts]
    for index, bad in ((0, "{"), (7, '{"body": 1}'), (150, '{"text": "\\ud800"}'), (299, "[]")):
        lines.insert(index, bad)
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    source = SourceConfig(str(tmp_path / "bad.jsonl"), on_bad_record="skip")
    config = dataclasses.replace(config, shuffle=False, epochs=1)
    with make_loader(dataclasses.replace(config, sources=(source,)), TOKENIZER) as loader:
        batches = [next(loader) for _ in range(10)]
        place, rest = loader.get_state(), list(loader)
        assert loader.metrics() == {"bad_records": 4.0}
        loader.set_state(place)
        assert_same(list(loader), rest)
        assert loader.metrics() == {"bad_records": 4.0}
    assert_same(batches + rest, take(config))
    with pytest.raises(InputError, match="bad.jsonl, line 1 is not valid JSON"):
        make_loader(dataclasses.replace(config, sources=(SourceConfig(source.path),)), TOKENIZER)


def test_a_closed_loader_says_so(config):
    loader = make_loader(config, TOKENIZER)
    loader.close()
    loader.close()
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_errors(tmp_path, config):
    for change, message in (
        ({"sources": ()}, "no source"),
        ({"sequence_length": 1}, "sequence_length is 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"fim_rate": 1.5}, "fim_rate is 1.5"),
        ({"epochs": 0}, "epochs is 0"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(config, **change)
    with pytest.raises(InputError, match="weight of x is -1"):
        SourceConfig("x", weight=-1)
    with pytest.raises(InputError, match="overlap"):
        dataclasses.replace(config, length_shares=(LengthShare(1), LengthShare(1, min_tokens=5)))
    with pytest.raises(InputError, match="from 5 to 5"):
        LengthShare(1, min_tokens=5, max_tokens=5)
    with pytest.raises(InputError, match="fill-in-the-middle needs <|fim_prefix|>"):
        make_loader(dataclasses.replace(config, fim_rate=0.5), byte_tokenizer(["endoftext"]))


def test_nothing_to_learn_is_one_sentence(config):
    never = dataclasses.replace(config, length_shares=(LengthShare(1, min_tokens=10**6),))
    with make_loader(never, TOKENIZER) as loader, pytest.raises(InputError, match="none of 300 documents"):
        next(loader)


def test_a_file_that_breaks_later_is_one_sentence_from_a_worker_too(tmp_path, config):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(200):
        (folder / f"{number:03}.txt").write_bytes(b"fine")
    (folder / "001.txt").write_bytes(b"not \xff fine")
    config = dataclasses.replace(config, sources=(SourceConfig(str(folder)),), shuffle=False, num_workers=1)
    with (
        make_loader(config, TOKENIZER) as loader,
        pytest.raises(InputError, match=r"001.txt is not UTF-8 text \(at byte 4"),
    ):
        next(loader)
