"""safetensors files, read without the library: only their headers, so that tensors are read slice by slice."""

from __future__ import annotations

import json
from pathlib import Path

from qwen_jax.errors import InputError
from qwen_jax.weights.stored import StoredTensor


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name. Raises InputError when it is damaged or truncated."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            raise InputError(f"{path} is damaged or truncated ({size} bytes); download it again.")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = [(name, e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{path} is damaged: its header is not a safetensors header; download it again.") from None
    tensors = {}
    for name, dtype, shape, begin, end in entries:
        tensors[name] = tensor = StoredTensor(path, 8 + length + begin, shape, dtype)
        if tensor.num_bytes != end - begin:
            raise InputError(f"{path} is damaged: tensor {name} has not the bytes of its shape; download it again.")
        if tensor.offset + tensor.num_bytes > size:
            raise InputError(
                f"{path} is truncated: tensor {name} ends at byte {tensor.offset + tensor.num_bytes}, "
                f"but the file has {size}; download it again."
            )
    return tensors
