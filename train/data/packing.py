"""Documents to rows of a fixed length. A token never sees another document: every piece of one is a segment."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

# What best-fit packs together, at least: more wastes less, but more is read again when training resumes.
WINDOW_ROWS, WINDOW_TOKENS = 64, 1 << 20

Row = dict[str, np.ndarray]


class Piece(NamedTuple):
    """Tokens [start, stop) of a document. `learned` marks the tokens that are to be predicted; None means all."""

    tokens: np.ndarray
    learned: np.ndarray | None
    start: int
    stop: int


def make_row(pieces: Sequence[Piece], length: int, pad_id: int) -> Row:
    """One row of `pieces` in order: tokens, targets, positions, segment_ids int32 [T] and loss_mask float32 [T].

    A token's target is the next token of its document, also where the document is cut after it; the last token of a
    document has none. Padding has segment 0, position 0 and `pad_id`.
    """
    tokens, targets = np.full((2, length), pad_id, np.int32)
    positions, segment_ids = np.zeros((2, length), np.int32)
    loss_mask = np.zeros(length, np.float32)
    at = 0
    for segment, (document, learned, start, stop) in enumerate(pieces, start=1):
        end = at + stop - start
        tokens[at:end] = document[start:stop]
        positions[at:end] = np.arange(stop - start)
        segment_ids[at:end] = segment
        following = document[start + 1 : stop + 1]
        with_target = slice(at, at + len(following))
        targets[with_target] = following
        loss_mask[with_target] = 1 if learned is None else learned[start + 1 : stop + 1]
        at = end
    return {
        "tokens": tokens,
        "targets": targets,
        "positions": positions,
        "segment_ids": segment_ids,
        "loss_mask": loss_mask,
    }


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices into `lengths`, none above `capacity`: best-fit decreasing.

    The longest come first, each into the bin that it leaves the least room in ("Fewer Truncations Improve Language
    Modeling", section 3).
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, bin), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(rooms, (lengths[index], -1))
        if at < len(rooms):
            room, chosen = rooms.pop(at)
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(index)
        if room > lengths[index]:
            bisect.insort(rooms, (room - lengths[index], chosen))
    return bins


class BestFit(grain.IterDataset):
    """The pieces of rows of whole documents; one longer than a row is cut into some of at most a row, none is dropped.

    Documents are gathered until they fill WINDOW_ROWS rows and WINDOW_TOKENS tokens, then packed together; the rows
    come in random order.
    """

    def __init__(self, documents: grain.IterDataset, *, length: int, seed: int) -> None:
        super().__init__(documents)
        self.length, self.row_seed = length, seed

    def __iter__(self) -> grain.DatasetIterator:
        return _BestFitIterator(self._parent.__iter__(), self)


class _BestFitIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, dataset: BestFit) -> None:
        super().__init__(parent)
        self._dataset = dataset
        self.set_state({"parent": parent.get_state(), "window": 0, "row": 0})

    def __next__(self) -> list[Piece]:
        if self._rows is None:
            self._rows = self._pack()
        if self._next_row == len(self._rows):
            self._rows = None
            self._start, self._window, self._next_row = self._parent.get_state(), self._window + 1, 0
            self._rows = self._pack()
        self._next_row += 1
        return self._rows[self._next_row - 1]

    def _pack(self) -> list[list[Piece]]:
        length = self._dataset.length
        pieces: list[Piece] = []
        missing = max(WINDOW_ROWS * length, WINDOW_TOKENS)
        while missing > 0:
            try:
                document = next(self._parent)
            except StopIteration:
                if not pieces:
                    raise
                break
            tokens, learned = document["tokens"], document.get("learned")
            missing -= len(tokens)
            starts = range(0, len(tokens), length)
            pieces += [Piece(tokens, learned, start, min(start + length, len(tokens))) for start in starts]
        bins = best_fit([piece.stop - piece.start for piece in pieces], length)
        order = np.random.default_rng((self._dataset.row_seed, self._window)).permutation(len(bins))
        return [[pieces[index] for index in bins[i]] for i in order]

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._start, "window": self._window, "row": self._next_row}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._start, self._window, self._next_row = state["parent"], state["window"], state["row"]
        self._rows: list[list[Piece]] | None = None


class Concat(grain.IterDataset):
    """The pieces of rows of all documents one after the other, split wherever a row ends: no padding until the end."""

    def __init__(self, documents: grain.IterDataset, *, length: int) -> None:
        super().__init__(documents)
        self.length = length

    def __iter__(self) -> grain.DatasetIterator:
        return _ConcatIterator(self._parent.__iter__(), self)


class _ConcatIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, dataset: Concat) -> None:
        super().__init__(parent)
        self._dataset = dataset
        self.set_state({"parent": parent.get_state(), "offset": 0})

    def __next__(self) -> list[Piece]:
        pieces: list[Piece] = []
        room = self._dataset.length
        while room:
            document = self._document
            if document is None:
                before = self._parent.get_state()
                try:
                    document = self._document = next(self._parent)
                except StopIteration:
                    if not pieces:
                        raise
                    break
                self._before = before
            tokens, learned = document["tokens"], document.get("learned")
            stop = min(self._offset + room, len(tokens))
            pieces.append(Piece(tokens, learned, self._offset, stop))
            room -= stop - self._offset
            self._offset = stop
            if stop == len(tokens):
                self._document, self._offset = None, 0
        return pieces

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._before if self._offset else self._parent.get_state(), "offset": self._offset}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._before, self._offset = state["parent"], state["offset"]
        self._document: dict[str, np.ndarray] | None = None
