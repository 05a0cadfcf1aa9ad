"""Our own checkpoints: the stacked parameter tree in Orbax's format, with config.json and the tokenizer beside it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.checked import printable, read_json
from qwen_jax.config import load_config
from qwen_jax.errors import InputError
from qwen_jax.weights._files import new_folder, progress_bar
from qwen_jax.weights.checkpoint import Checkpoint, Index, block_shape, blocks, copy_assets, read_hf_extra
from qwen_jax.weights.export import write_config
from qwen_jax.weights.load import put_leaf
from qwen_jax.weights.names import leaves


def save_orbax(checkpoint: Checkpoint, folder: str | Path, *, dtype: Any = None, progress: bool = True) -> None:
    """Writes a folder that both `orbax.checkpoint.StandardCheckpointer().restore` and `open_checkpoint` read.

    `dtype` casts every leaf (default: as the checkpoint says). Memory stays at a few blocks of BLOCK_BYTES: each block
    is one chunk of the stored array. Raises InputError when the folder exists or cannot be written.
    """
    dtypes = {path: np.dtype(dtype) if dtype is not None else stored for path, stored in checkpoint.dtypes.items()}
    total = sum(math.prod(leaf.shape) * dtypes[leaf.path].itemsize for leaf in checkpoint.leaves)
    workers = min(4, os.cpu_count() or 1)
    with new_folder(Path(folder)) as temporary, progress_bar("writing", total, show=progress) as advance:
        out = temporary / "orbax"
        _write_skeleton(out, checkpoint, dtypes)
        with ThreadPoolExecutor(workers) as pool:
            for leaf in checkpoint.leaves:
                with _os_errors():
                    array = _create(out, leaf.path, leaf.shape, dtypes[leaf.path])

                def write(block: Index, path: str = leaf.path, array: Any = array) -> None:
                    host = np.empty([s.stop - s.start for s in block], dtypes[path])
                    checkpoint.read(path, block, host)
                    with _os_errors():
                        array[block].write(host, can_reference_source_data_indefinitely=True).result()
                    advance(host.nbytes)

                list(pool.map(write, blocks(leaf.shape, dtypes[leaf.path].itemsize)))
        for entry in out.iterdir():
            entry.rename(temporary / entry.name)
        out.rmdir()
        stored = {d.name for d in dtypes.values()}
        write_config(checkpoint, temporary, "float32" if len(stored) > 1 else stored.pop())


def _write_skeleton(folder: Path, checkpoint: Checkpoint, dtypes: dict[str, np.dtype]) -> None:
    """Lets Orbax itself write its metadata, for a tree of the right structure whose arrays have one element each.

    Shapes are not in Orbax's metadata but in the arrays' own files, which are then replaced.
    """
    import orbax.checkpoint as ocp

    tree: dict[str, Any] = {}
    for leaf in checkpoint.leaves:
        put_leaf(tree, leaf.path, np.zeros(1, dtypes[leaf.path]))
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)  # Orbax warns that there are no OCDBT files to merge, as was asked for
    try:
        with _os_errors(), ocp.StandardCheckpointer(use_ocdbt=False) as checkpointer:
            checkpointer.save(folder.absolute(), tree)
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """TensorStore reports a full disk as a ValueError; this makes it the OSError that it was."""
    try:
        yield
    except ValueError as error:
        if code := re.search(r"os_error_code='(\d+)'", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
        raise


def _array_spec(folder: Path, path: str, *, ocdbt: bool = False, zarr3: bool = False) -> dict[str, Any]:
    name = path.replace("/", ".")
    base = str(folder.absolute())
    kvstore: dict[str, Any] = {"driver": "file", "path": f"{base}/{name}/"}
    if ocdbt:
        kvstore = {"driver": "ocdbt", "base": f"file://{base}/", "path": f"{name}/"}
    return {"driver": "zarr3" if zarr3 else "zarr", "kvstore": kvstore}


def _create(folder: Path, path: str, shape: tuple[int, ...], dtype: np.dtype) -> Any:
    import tensorstore as ts

    # no compression: bfloat16 weights shrink by a quarter at best, and reading would cost more than the disk
    metadata = {"compressor": None, "chunks": block_shape(shape, dtype.itemsize)}
    spec = _array_spec(folder, path) | {"metadata": metadata, "store_data_equal_to_fill_value": True}
    return ts.open(spec, create=True, delete_existing=True, dtype=dtype, shape=shape).result()


class OrbaxCheckpoint(Checkpoint):
    """A folder that save_orbax wrote, or any Orbax save of a parameter tree beside its config.json.

    Raises InputError when it is not the tree of its config.json.
    """

    def __init__(self, folder: Path) -> None:
        import tensorstore as ts

        self.config = load_config(folder)
        self.hf_extra = read_hf_extra(folder)
        self.leaves = leaves(self.config, "hf")
        self.source = folder
        metadata = read_json(folder / "_METADATA")
        try:
            stored = {"/".join(part["key"] for part in e["key_metadata"]) for e in metadata["tree_metadata"].values()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{folder}/_METADATA is damaged; convert the checkpoint again.") from None
        expected = {leaf.path for leaf in self.leaves}
        if missing := sorted(expected - stored):
            raise InputError(f"{folder} lacks the parameter {missing[0]}; it does not belong to its config.json.")
        if extra := sorted(stored - expected):
            raise InputError(
                f"{folder} holds the parameter {printable(extra[0])}, which its config.json does not have."
            )
        formats = {"ocdbt": bool(metadata.get("use_ocdbt")), "zarr3": bool(metadata.get("use_zarr3"))}
        self._arrays = {}
        for leaf in self.leaves:
            try:
                # a chunk that is not there is lost, not zero: every chunk is written, whatever it holds
                spec = _array_spec(folder, leaf.path, **formats) | {"fill_missing_data_reads": False}
                array = ts.open(spec, open=True, read=True).result()
            except ValueError:
                raise InputError(f"{folder}: the files of {leaf.path} are incomplete; convert it again.") from None
            if tuple(array.shape) != leaf.shape:
                raise InputError(
                    f"{folder}: parameter {leaf.path} has shape {tuple(array.shape)}, but config.json says "
                    f"{leaf.shape}; they do not belong together."
                )
            self._arrays[leaf.path] = array
        self.dtypes = {path: array.dtype.numpy_dtype for path, array in self._arrays.items()}

    def _read(self, path: str, index: Index, out: np.ndarray) -> None:
        try:
            out[...] = self._arrays[path][index].read().result()
        except ValueError:
            raise InputError(f"{self.source}: the files of {path} are damaged or lost; convert it again.") from None

    def write_assets(self, folder: Path) -> None:
        copy_assets(self.source, folder)
