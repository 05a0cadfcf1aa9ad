"""What the tests of generation share."""

import jax
import pytest

from infer.qwen import Qwen
from qwen_jax.model import Params, init
from tests.infer import tiny


@pytest.fixture(scope="session")
def params() -> Params:
    """A small random model, not to be taken over: give a `Qwen` a copy."""
    return init(tiny.CONFIG, jax.random.key(0))


@pytest.fixture(scope="session")
def qwen(params) -> Qwen:
    return Qwen(tiny.CONFIG, params, tiny.tokenizer())
