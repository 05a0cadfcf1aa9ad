"""`pytorch_model.bin`: finds the tensors in a torch file without running anything that its pickle names."""

from __future__ import annotations

import pickle
from pathlib import Path

from qwen_jax.errors import InputError
from qwen_jax.weights.stored import StoredTensor


def read_torch_bin(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file that `torch.save` wrote, by name; they are mapped, not loaded.

    Raises InputError when torch is not installed, or the file is damaged, of the format before torch 1.6, or holds
    anything but tensors.
    """
    try:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError:
        raise InputError(f"reading {path} needs torch; install qwen-jax[torch], or use safetensors files.") from None
    encodings = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    try:
        # fake tensors carry shape, strides and the storage's place in the file, and no data
        with FakeTensorMode():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(f"{path} holds more than tensors, and its code is never run; use safetensors files.") from None
    except (RuntimeError, ValueError, EOFError, KeyError, OSError):
        raise InputError(f"{path} is damaged or truncated, or not a torch file; download it again.") from None
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise InputError(f"{path} is not a plain mapping of names to tensors; use the model's safetensors files.")
    size = path.stat().st_size
    tensors = {}
    for name, value in state.items():
        begin = getattr(value.untyped_storage(), "_checkpoint_offset", None)
        if begin is None:
            raise InputError(f"{path} is in torch's format from before 1.6; load and save it once with a newer torch.")
        encoding = encodings.get(value.dtype, str(value.dtype))
        offset = begin + value.storage_offset() * value.element_size()
        strides = None if value.is_contiguous() else tuple(value.stride())
        tensors[name] = StoredTensor(path, offset, tuple(value.shape), encoding, strides)
        if offset + tensors[name].num_bytes > size:
            raise InputError(f"{path} is truncated: tensor {name} ends beyond its {size} bytes; download it again.")
    return tensors
