"""Every test runs on eight CPU devices, with rank promotion an error."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def default_gguf() -> Path:
    """The default model's GGUF file: real weights, downloaded once into the user's cache."""
    from qwen_jax.errors import InputError
    from qwen_jax.weights.default_model import default_model

    try:
        return default_model()
    except InputError as error:
        pytest.skip(str(error))
