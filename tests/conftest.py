"""Every test runs on eight CPU devices, with rank promotion an error."""

import ctypes
import gc
import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax  # noqa: E402
import psutil  # noqa: E402
import pytest  # noqa: E402
from packaging.requirements import Requirement  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

# glibc's: gives freed memory back to the system, which it does not do by itself
malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)


def pytest_report_header() -> list[str]:
    """The installed versions that are not those in constraints.txt."""
    others = []
    for line in (Path(__file__).parent.parent / "constraints.txt").read_text().splitlines():
        if line.startswith("#") or ((pin := Requirement(line)).marker and not pin.marker.evaluate()):
            continue
        try:
            installed = importlib.metadata.version(pin.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if installed not in pin.specifier:
            others.append(f"{pin.name} {installed} (locked{str(pin.specifier).replace('==', ' ')})")
    return [f"not as locked: {', '.join(others)}"] if others else []


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """A worker above 1.5 GB forgets its compiled programs: those of a whole run are several gigabytes."""
    yield
    if psutil.Process().memory_info().rss > 1.5e9:
        jax.clear_caches()
        gc.collect()
        malloc_trim(0)


@pytest.fixture(scope="session")
def default_gguf() -> Path:
    """The default model's GGUF file: real weights, downloaded once into the user's cache."""
    from qwen_jax.errors import InputError
    from qwen_jax.weights.default_model import default_model

    try:
        return default_model()
    except InputError as error:
        pytest.skip(str(error))
