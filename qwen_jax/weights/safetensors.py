"""safetensors files: the library checks the header, and says where each tensor lies, so that slices can be read."""

from __future__ import annotations

from pathlib import Path

from qwen_jax.checked import printable
from qwen_jax.errors import InputError
from qwen_jax.weights._files import reading
from qwen_jax.weights.stored import StoredTensor


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name. Raises InputError when it is damaged or truncated."""
    from safetensors import SafetensorError, safe_open

    tensors = {}
    try:
        with reading(path), path.open("rb") as file:
            offset = 8 + int.from_bytes(file.read(8), "little")
        with safe_open(path, framework="numpy") as file:
            for name in file.offset_keys():  # they lie one after another, without gaps
                view = file.get_slice(name)
                tensors[name] = tensor = StoredTensor(path, offset, tuple(view.get_shape()), view.get_dtype())
                offset += tensor.num_bytes
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or truncated ({printable(str(error))}); download it again.") from None
    return tensors
