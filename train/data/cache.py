"""Files made once from a user's files, in the user's cache: unpacked, converted, indexed."""

from __future__ import annotations

import functools
import hashlib
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from qwen_jax.errors import InputError
from qwen_jax.local_path import cache_folder
from qwen_jax.weights._files import progress_bar, writing

COMPRESSED_SUFFIXES = (".gz", ".zst")
_SHOW_PROGRESS_ABOVE = 1 << 28  # bytes


def cached(file: Path, ending: str, make: Callable[[IO[bytes]], None]) -> Path:
    """A file made once from `file` in the user's cache; another content or another `ending` is another file."""
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns} {ending}".encode()).hexdigest()[:16]
    target = cache_folder() / "data" / f"{file.name}-{key}"
    if not target.exists():
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            # of a name that no other process has, also where several hosts share the folder
            partial = tempfile.NamedTemporaryFile(dir=target.parent, suffix=".partial", delete=False)
        try:
            with partial as out:
                make(out)
            Path(partial.name).rename(target)
        finally:
            Path(partial.name).unlink(missing_ok=True)
    return target


def unpacked(file: Path) -> Path:
    """`file`, or its content in the cache when it is compressed. Raises InputError when it is damaged."""
    if file.suffix not in COMPRESSED_SUFFIXES:
        return file
    return cached(file, "unpacked", lambda out: out.writelines(_decompressed(file)))


def _decompressed(file: Path) -> Iterator[bytes]:
    new, damage = _decoder(file.suffix)
    decoder, started = new(), False
    with file.open("rb") as raw, progress(f"unpacking {file.name}", file) as advance:
        try:
            while chunk := raw.read(1 << 16):
                advance(len(chunk))
                while chunk:  # a file may hold several streams, one after the other
                    yield decoder.decompress(chunk)
                    started, chunk = not decoder.eof, decoder.unused_data
                    if decoder.eof:
                        decoder = new()
        except damage as error:
            raise InputError(f"{file} is damaged ({error}); copy or download it again.") from None
    if started:
        raise InputError(f"{file} is damaged (it ends too early); copy or download it again.")


def _decoder(suffix: str) -> tuple[Callable[[], Any], type[Exception]]:
    if suffix == ".gz":
        return functools.partial(zlib.decompressobj, wbits=31), zlib.error
    try:
        import zstandard
    except ImportError:
        raise InputError("reading .zst files needs zstandard; run: pip install 'qwen-jax[train]'.") from None
    return lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError


def progress(description: str, file: Path) -> Any:
    size = file.stat().st_size
    return progress_bar(description, size, show=size > _SHOW_PROGRESS_ABOVE and sys.stderr.isatty())
