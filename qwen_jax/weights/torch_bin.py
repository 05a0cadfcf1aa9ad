"""`pytorch_model.bin`: finds the tensors in a torch file without running anything that its pickle names."""

from __future__ import annotations

import pickle
import pickletools
import zipfile
from pathlib import Path

from qwen_jax.checked import printable
from qwen_jax.errors import InputError
from qwen_jax.weights._files import reading
from qwen_jax.weights.stored import StoredTensor

# what the pickle of a state dict names, besides classes of storages
_NEEDED = ("OrderedDict", "_rebuild_tensor_v2", "_rebuild_parameter")


def _damaged(path: Path) -> InputError:
    return InputError(f"{path} is damaged or truncated, or not a torch file; download it again.")


def _not_only_tensors(path: Path) -> InputError:
    return InputError(f"{path} holds more than tensors, and its code is never run; use safetensors files.")


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
    _check_archive(path)
    try:
        # fake tensors carry shape, strides and the storage's place in the file, and no data
        with FakeTensorMode():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise _not_only_tensors(path) from None
    except Exception:  # whatever the pieces of a damaged file make of each other
        raise _damaged(path) from None
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise InputError(f"{path} is not a plain mapping of names to tensors; use the model's safetensors files.")
    tensors = {}
    for name, value in state.items():
        storage, item = value.untyped_storage(), value.element_size()
        begin = getattr(storage, "_checkpoint_offset", None)
        if begin is None or not isinstance(name, str) or value.layout != torch.strided:
            raise InputError(f"{path} holds something else than plain tensors by name; use safetensors files.")
        first = value.storage_offset() * item
        strides = None if value.is_contiguous() else tuple(value.stride())
        encoding = encodings.get(value.dtype, str(value.dtype))
        tensors[name] = tensor = StoredTensor(path, begin + first, tuple(value.shape), encoding, strides)
        if first + tensor.num_bytes > storage.nbytes() or tensor.offset + tensor.num_bytes > path.stat().st_size:
            raise InputError(f"{path} is truncated: tensor {printable(name)} ends beyond its data; download it again.")
    return tensors


def _check_archive(path: Path) -> None:
    """Raises InputError unless torch would only make tensors of the file, and of no more memory than the file has.

    torch itself would inflate a compressed pickle, and lets a pickle ask for a bytearray of any size.
    """
    with reading(path), path.open("rb") as file:
        if file.read(2) == b"\x80\x02":
            raise InputError(f"{path} is in torch's format from before 1.6; load and save it once with a newer torch.")
        try:
            archive = zipfile.ZipFile(file)
            records = archive.infolist()
            stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
            fits = sum(record.file_size for record in records) <= path.stat().st_size
            name = next(record.filename for record in records if record.filename.endswith("data.pkl"))
            opcodes = [(code.name, arg) for code, arg, _ in pickletools.genops(archive.read(name))] if stored else []
        except Exception:  # whatever the pieces of a damaged file make of each other
            raise _damaged(path) from None
    if not stored or not fits:
        raise InputError(
            f"{path} has compressed or overlapping records, which torch does not write; download it again."
        )
    found = {"".join(str(arg).split()[-1:]) for code, arg in opcodes if code == "GLOBAL"}
    strange = [name for name in found if name not in _NEEDED and not name.endswith("Storage")]
    if strange or any(code in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "EXT1", "EXT2", "EXT4") for code, _ in opcodes):
        raise _not_only_tensors(path)
