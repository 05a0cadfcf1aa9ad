"""What the processes of one run tell each other, so that all go on or all end."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from qwen_jax.errors import CheckFailed, EnvironmentFailed, InputError
from train.config import ProcessesConfig

_KINDS = {kind.status: kind for kind in (CheckFailed, InputError, EnvironmentFailed)}


def join(processes: ProcessesConfig) -> None:
    """Makes this process one of a run's. Raises InputError when it is not told which."""
    if processes.coordinator == "auto":
        jax.distributed.initialize()
    elif processes.coordinator:
        if processes.count is None or processes.index is None:
            raise InputError("processes.coordinator needs processes.count and processes.index beside it.")
        jax.distributed.initialize(processes.coordinator, processes.count, processes.index)


def gather(value: Any) -> list[Any]:
    """What each process gave, a value that JSON can hold; all processes must call it."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(text.size)).ravel()
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block without collectives that ends well on all processes or raises on all: where it failed its own exception
    (for an OSError EnvironmentFailed), elsewhere one that names the process."""
    failure: Exception | None = None
    try:
        yield
    except OSError as error:
        failure = EnvironmentFailed(f"{error.filename}: {(error.strerror or str(error)).lower()}")
        failure.__cause__ = error
    except Exception as error:
        failure = error
    found = gather(None if failure is None else [getattr(failure, "status", 1), str(failure)])
    if failure is not None:
        raise failure
    for process, problem in enumerate(found):
        if problem is not None:
            raise _KINDS[problem[0]](f"process {process}: {problem[1]}")
