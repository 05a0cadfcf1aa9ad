"""What the tests of weights share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def default_reader(default_gguf: Path):
    """The `gguf` package's reader of the default model, which takes seconds to make."""
    return pytest.importorskip("gguf").GGUFReader(default_gguf)
