"""Batches of packed rows, the same for the same config, from an iterator whose place is a small JSON-able state."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from qwen_jax.errors import EnvironmentFailed, InputError
from qwen_jax.tokenizer import Tokenizer
from train.data.config import DataConfig, LengthShare
from train.data.documents import FIM_TOKENS, REPO_TOKENS, Tokenise, check_special_tokens, mean_tokens
from train.data.packing import BestFit, Concat, Piece, make_row
from train.data.records import Source
from train.data.shards import Shards
from train.data.sources import fingerprint, open_source

PREFETCHED_BATCHES = 2
# Sent by a worker at once, because each sending takes as long as tokenising some hundred tokens; and how many it
# prepares ahead.
_CHUNK, _CHUNKS_AHEAD = 16, 4

Batch = dict[str, np.ndarray]


def make_loader(config: DataConfig, tokenizer: Tokenizer, rows: Sequence[int] | None = None) -> DataIterator:
    """Those rows of every batch that a process needs; by default all.

    `next()` gives a dict of arrays [len(rows), sequence_length]: tokens, targets (the next token of the same document),
    positions (from 0 in each segment) and segment_ids (0 is padding, 1, 2, ... the row's segments), all int32, and
    loss_mask float32, which is 0 at padding and where a document has ended. There is one global order: whatever rows a
    process takes, and however many processes there are, the batches are the same. Raises InputError when a source or
    the config cannot be used.
    """
    if config.fim_rate:
        check_special_tokens(tokenizer, FIM_TOKENS, "fill-in-the-middle")
    if any(source.repo_level for source in config.sources):
        check_special_tokens(tokenizer, REPO_TOKENS, "repo_level")
    sources = [open_source(source) for source in config.sources]
    tokenised = [source for source in sources if isinstance(source, Shards)]
    for source in tokenised:
        source.check(tokenizer, config.fim_rate)
    documents, epoch = _documents(config, sources, tokenizer)
    workers = 0 if len(tokenised) == len(sources) else config.num_workers  # there is nothing to tokenise
    shares = config.length_shares or (LengthShare(1.0),)
    packed = [_packed(Documents(documents, share, epoch, workers), config) for share in shares]
    dataset = packed[0] if len(packed) == 1 else grain.IterDataset.mix(packed, [share.share for share in shares])
    wanted = range(config.batch_size) if rows is None else rows

    def batch(pieces: Sequence[Sequence[Piece]]) -> Batch:
        """The wanted rows; those that the last batch of finite data lacks are padding."""
        of_rows = [pieces[row] if row < len(pieces) else () for row in wanted]
        made = [make_row(row, config.sequence_length, tokenizer.pad_id) for row in of_rows]
        return {name: np.stack([row[name] for row in made]) for name in made[0]}

    dataset = dataset.batch(config.batch_size, batch_fn=list).map(batch)
    identity = {
        **dataclasses.asdict(dataclasses.replace(config, sources=config.sources[:1])),
        "sources": [
            {
                "content": f"{len(source)} documents, {fingerprint(source)}",
                **{
                    name: getattr(c, name)
                    for name in ("weight", "text_field", "messages_field", "repo_level", "on_bad_record")
                },
            }
            for source, c in zip(sources, config.sources, strict=True)
        ],
        "tokens in the vocabulary": len(tokenizer),
    }
    del identity["num_workers"]  # any number of workers gives the same batches
    return DataIterator(dataset, identity)


class DataIterator:
    """Batches, two of them prepared ahead in a thread. Close it, or use it in `with`, to end its worker processes."""

    def __init__(self, dataset: grain.IterDataset, identity: dict[str, Any]) -> None:
        self._identity = json.loads(json.dumps(identity))  # as a checkpoint gives it back
        prefetched = grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=PREFETCHED_BATCHES)
        self._open = [prefetched.__iter__()]
        # Also at exit, while modules are whole: what grain does when the interpreter deletes an iterator needs them
        self._end = weakref.finalize(self, _close, self._open)

    @property
    def _batches(self) -> grain.DatasetIterator:
        if not self._open:
            raise ValueError("the data iterator is closed")
        return self._open[0]

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def next(self, step: int, policy: Any) -> Batch | None:
        """The next batch, whatever the weights are; None at the end."""
        return next(self, None)

    def get_state(self) -> dict[str, Any]:
        """The place after the last batch that was taken, a few hundred bytes that `json` can hold."""
        return {"config": copy.deepcopy(self._identity), "place": copy.deepcopy(self._batches.get_state())}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `get_state` was called, on any process: the next batches equal those of an uninterrupted run,
        bit for bit.

        Raises InputError when the state is of other data or another config.
        """
        if changed := [name for name in self._identity if state["config"].get(name) != self._identity[name]]:
            raise InputError(
                f"the saved place is of other data: {changed[0]} was {state['config'].get(changed[0])} and is now "
                f"{self._identity[changed[0]]}; restore the old setting, or start the data afresh."
            )
        self._batches.set_state(copy.deepcopy(state["place"]))

    def metrics(self) -> dict[str, float]:
        """Records that were left out because they are bad, where there are any."""
        bad = _count(self._batches.get_state(), "bad")
        return {"bad_records": float(bad)} if bad else {}

    def close(self) -> None:
        """Ends threads and worker processes; no batch can be taken afterwards."""
        self._end()

    def __enter__(self) -> DataIterator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _count(state: Any, name: str) -> int:
    """The sum of all numbers of this name in a state."""
    if isinstance(state, dict):
        return sum(value if key == name else _count(value, name) for key, value in state.items())
    return sum(_count(value, name) for value in state) if isinstance(state, list) else 0


def _close(iterators: list[grain.DatasetIterator]) -> None:
    while iterators:
        iterators.pop().close()


class Documents(grain.IterDataset):
    """Tokenised documents of some lengths, in order. Its state is one number, whatever the number of workers.

    A document of fewer than two tokens has nothing to learn and is left out. Raises InputError when a whole epoch holds
    no document that fits.
    """

    def __init__(self, documents: grain.MapDataset, lengths: LengthShare, epoch: int, num_workers: int) -> None:
        super().__init__()
        self.documents, self.lengths, self.epoch, self.num_workers = documents, lengths, epoch, num_workers

    def __iter__(self) -> grain.DatasetIterator:
        return _DocumentsIterator(self)


class _DocumentsIterator(grain.DatasetIterator):
    def __init__(self, dataset: Documents) -> None:
        super().__init__()
        self._dataset = dataset
        self._next, self._left_out, self._bad = 0, 0, 0
        self._source: grain.DatasetIterator | None = None
        self._chunk: list[dict[str, np.ndarray]] = []  # the last is next

    def __next__(self) -> dict[str, np.ndarray]:
        shortest, longest = max(2, self._dataset.lengths.min_tokens), self._dataset.lengths.max_tokens or math.inf
        if self._source is None:
            self._source, self._chunk = self._from(self._next), []
        while True:
            if not self._chunk:
                self._chunk = self._read()[::-1]
            document = self._chunk.pop()
            self._next += 1
            self._bad += "bad" in document
            if shortest <= len(document["tokens"]) < longest:
                self._left_out = 0
                return document
            self._left_out += 1
            if self._left_out >= self._dataset.epoch:
                limit = "or more" if longest == math.inf else f"to {longest - 1}"
                raise InputError(
                    f"none of {self._left_out} documents, a whole epoch, has {shortest} {limit} tokens; "
                    "change the length shares, or add documents."
                )

    def _read(self) -> list[dict[str, np.ndarray]]:
        assert self._source is not None
        try:
            return next(self._source)
        except RuntimeError as error:  # of grain, when a worker has ended
            raise EnvironmentFailed(
                f"a data worker ended ({str(error).splitlines()[0][:100]}), perhaps for lack of memory; run the same "
                "command again, with fewer `num_workers`."
            ) from error

    def _from(self, start: int) -> grain.DatasetIterator:
        dataset = self._dataset.documents.slice(slice(start, None)).batch(_CHUNK, batch_fn=list)
        read = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        if not flags.FLAGS.is_parsed():  # grain's workers ask for its flags, which only an absl program parses
            flags.FLAGS.mark_as_parsed()
        # By a pipe: arrays in shared memory outlive a loader that is closed early
        read = grain.experimental.WithOptionsIterDataset(read, grain.experimental.DatasetOptions(min_shm_size=1 << 62))
        options = grain.MultiprocessingOptions(self._dataset.num_workers, _CHUNKS_AHEAD)
        return read.mp_prefetch(options, worker_init_fn=_end_with_parent).__iter__()

    def get_state(self) -> dict[str, Any]:
        return {"next": self._next, "bad": self._bad}

    def set_state(self, state: dict[str, Any]) -> None:
        if self._source is not None:
            self._source.close()
        self._source, self._next, self._bad, self._left_out = None, state["next"], state["bad"], 0

    def close(self) -> None:
        super().close()
        if self._source is not None:
            self._source.close()


def _end_with_parent(_index: int, _count: int) -> None:
    """In a worker: ends it when the main process is gone, which a kill leaves no time to say."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _documents(config: DataConfig, sources: Sequence[Source], tokenizer: Tokenizer) -> tuple[grain.MapDataset, int]:
    """The mixture of tokenised documents, and how many of it show each document at least once."""
    tokenise = Tokenise(tokenizer, fim_rate=config.fim_rate, max_tokens=config.sequence_length)
    streams = []
    for number, source in enumerate(sources):
        # far apart, because grain adds the epoch's number to the seed
        digest = hashlib.sha256(f"{config.seed} {number}".encode()).digest()
        seed = int.from_bytes(digest[:4], "little")
        stream = grain.MapDataset.source(source)
        if config.shuffle:
            stream = stream.shuffle(seed=seed)
        streams.append(stream.repeat(config.epochs).random_map(tokenise, seed=seed))
    if len(streams) == 1:
        return streams[0], len(sources[0])
    weights = [
        source.weight / mean_tokens(opened, tokenise) for source, opened in zip(config.sources, sources, strict=True)
    ]
    epoch = max(len(source) * sum(weights) / weight for source, weight in zip(sources, weights, strict=True))
    return grain.MapDataset.mix(streams, weights), math.ceil(epoch)


def _packed(documents: Documents, config: DataConfig) -> grain.IterDataset:
    if config.packing == "concat":
        return Concat(documents, length=config.sequence_length)
    return BestFit(documents, length=config.sequence_length, seed=config.seed)
