"""Both packers against brute force over random documents, and against grain's own packer."""

from __future__ import annotations

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data import packing
from train.data.packing import BestFit, Concat, best_fit, make_row

PAD = 999
LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=30)


def documents(lengths):
    """Documents whose tokens are all different: 1000 * number + place."""
    return [{"tokens": np.arange(n, dtype=np.int32) + 1000 * (i + 1)} for i, n in enumerate(lengths)]


def pack(kind, docs, length):
    parent = grain.MapDataset.source(docs).to_iter_dataset(grain.ReadOptions(0, 0))
    if kind == "concat":
        return Concat(parent, length=length).map(lambda pieces: make_row(pieces, length, PAD))
    return BestFit(parent, length=length, seed=3).map(lambda pieces: make_row(pieces, length, PAD))


def expected_targets(docs):
    """token -> its successor in its document."""
    return {int(a): int(b) for doc in docs for a, b in zip(doc["tokens"], doc["tokens"][1:], strict=False)}


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW_ROWS", 3)
    monkeypatch.setattr(packing, "WINDOW_TOKENS", 0)


@pytest.mark.parametrize("kind", ["best-fit", "concat"])
@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, length=st.integers(2, 24))
def test_rows_against_brute_force(kind, lengths, length):
    docs = documents(lengths)
    rows = list(pack(kind, docs, length))
    following = expected_targets(docs)
    seen = []
    for row in rows:
        assert {name: (array.dtype, array.shape) for name, array in row.items()} == {
            "tokens": (np.int32, (length,)),
            "targets": (np.int32, (length,)),
            "positions": (np.int32, (length,)),
            "segment_ids": (np.int32, (length,)),
            "loss_mask": (np.float32, (length,)),
        }
        used = int((row["segment_ids"] > 0).sum())
        steps = np.diff(row["segment_ids"][:used])
        assert row["segment_ids"][0] == 1 and set(steps) <= {0, 1}  # 1, 2, 3 ..., each in one stretch
        assert (row["segment_ids"][used:] == 0).all()
        position = 0
        for t in range(length):
            token, target, mask = int(row["tokens"][t]), int(row["targets"][t]), row["loss_mask"][t]
            if t >= used:
                assert (token, target, row["positions"][t], mask) == (PAD, PAD, 0, 0)
                continue
            starts = t == 0 or row["segment_ids"][t] != row["segment_ids"][t - 1]
            position = 0 if starts else position + 1
            assert row["positions"][t] == position
            if not starts:  # a segment is a stretch of one document
                assert token == row["tokens"][t - 1] + 1
            assert mask == (token in following)
            assert target == following.get(token, PAD)
            seen.append(token)
    assert sorted(seen) == sorted(int(token) for doc in docs for token in doc["tokens"])


@settings(max_examples=50, deadline=None)
@given(lengths=LENGTHS, length=st.integers(2, 24))
def test_concat_as_grain_packs_it(lengths, length):
    docs = documents(lengths)
    parent = grain.MapDataset.source(docs).to_iter_dataset(grain.ReadOptions(0, 0))
    theirs = list(grain.experimental.ConcatThenSplitIterDataset(parent, length_struct={"tokens": length}))
    ours = list(pack("concat", docs, length))
    assert len(ours) == len(theirs) == -(-sum(lengths) // length)
    for a, b in zip(ours, theirs, strict=True):
        used = a["segment_ids"] > 0
        np.testing.assert_array_equal(a["tokens"][used], b["tokens"][used])
        np.testing.assert_array_equal(a["segment_ids"], b["tokens_segment_ids"])
        np.testing.assert_array_equal(a["positions"], b["tokens_positions"])


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), max_size=60), capacity=st.integers(40, 80))
def test_best_fit_against_a_search_of_all_bins(lengths, capacity):
    rooms, expected = [], []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [(room, number) for number, room in enumerate(rooms) if room >= lengths[index]]
        if not fitting:
            rooms.append(capacity)
            expected.append([])
        number = min(fitting)[1] if fitting else len(rooms) - 1
        rooms[number] -= lengths[index]
        expected[number].append(index)
    assert best_fit(lengths, capacity) == expected


def test_best_fit_takes_the_tightest_bin():
    assert best_fit([6, 5, 4, 3], 10) == [[0, 2], [1, 3]]  # first-fit decreasing would do the same
    assert best_fit([7, 6, 4, 3], 10) == [[0, 3], [1, 2]]
    assert best_fit([5, 7, 3], 10) == [[1, 2], [0]]  # 3 goes to the 7 that came first, not to the emptier 5


def test_best_fit_cuts_only_what_is_longer_than_a_row():
    docs = documents([7, 5, 23, 2, 8, 4])
    pieces = [(row["tokens"][row["segment_ids"] == s]).tolist() for row in pack("best-fit", docs, 8) for s in (1, 2, 3)]
    found = sorted(piece for piece in pieces if piece)
    expected = [doc["tokens"][i : i + 8].tolist() for doc in docs for i in range(0, len(doc["tokens"]), 8)]
    assert found == sorted(expected)


def test_rows_of_a_window_come_in_another_order_in_each_window():
    rows = list(pack("best-fit", documents([8] * 60), 8))
    firsts = [int(row["tokens"][0]) // 1000 for row in rows]
    assert sorted(firsts) == list(range(1, 61))
    orders = {tuple(n - min(window) for n in window) for window in zip(*[iter(firsts)] * 3, strict=True)}
    assert len(orders) > 1


def test_learned_marks_targets():
    doc = {"tokens": np.array([5, 6, 7, 8], np.int32), "learned": np.array([True, False, True, True])}
    for kind in ("best-fit", "concat"):
        (row,) = pack(kind, [doc], 5)
        assert row["targets"].tolist() == [6, 7, 8, PAD, PAD]
        assert row["loss_mask"].tolist() == [0, 1, 1, 0, 0]


@pytest.mark.parametrize("kind", ["best-fit", "concat"])
@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, length=st.integers(2, 24), data=st.data())
def test_resume_at_every_row(kind, lengths, length, data):
    dataset = pack(kind, documents(lengths), length)
    iterator = iter(dataset)
    states, rows = [iterator.get_state()], []
    for row in iterator:
        rows.append(row)
        states.append(iterator.get_state())
    at = data.draw(st.integers(0, len(rows)))
    fresh = iter(dataset)
    fresh.set_state(states[at])
    assert fresh.get_state() == states[at]
    again = list(fresh)
    assert len(again) == len(rows) - at
    for a, b in zip(again, rows[at:], strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    assert list(fresh) == []  # an ended iterator stays ended
