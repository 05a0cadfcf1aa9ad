"""dtype="int8": a model in few bits by the C kernels, beside the same weights in float32."""

import dataclasses
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer.qwen import Qwen, load
from infer.sampling import Sampling
from qwen_jax.kernels import native
from qwen_jax.leaves import Weight
from qwen_jax.leaves.native import Native
from qwen_jax.model import Inputs, forward, init, unembed
from qwen_jax.weights.load import ParamsCheckpoint
from tests.infer import tiny

CONFIG = dataclasses.replace(
    tiny.CONFIG, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=96, initializer_range=0.1
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_folder(tmp_path_factory.mktemp("int8") / "model", CONFIG, init(CONFIG, jax.random.key(0)))


@pytest.fixture(scope="module")
def int8(folder: Path) -> Qwen:
    if reason := native.why_not():
        pytest.skip(reason)
    return load(folder, dtype="int8", progress=False)


def test_matrices_are_packed_and_nothing_else(int8: Qwen) -> None:
    leaves = jax.tree.leaves(int8.params, is_leaf=lambda leaf: isinstance(leaf, Weight))
    assert sum(isinstance(leaf, Native) for leaf in leaves) == 2 + 7 * CONFIG.num_layers
    assert all(isinstance(leaf, Native) or leaf.ndim < 3 and leaf.dtype == np.float32 for leaf in leaves)


def test_answers_are_near_those_in_float32(int8: Qwen) -> None:
    dense = jax.tree.map(
        lambda leaf: leaf.dense() if isinstance(leaf, Weight) else leaf,
        int8.params,
        is_leaf=lambda leaf: isinstance(leaf, Weight),
    )
    prompts = [list(range(5, 45)), list(range(100, 107))]
    answers = int8.generate(prompts, Sampling(), max_tokens=20)
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = jnp.asarray([prompt + answer.tokens], jnp.int32)
        hidden = forward(CONFIG, dense, Inputs.inference(tokens)).hidden[0, len(prompt) - 1 : -1]
        logits = unembed(CONFIG, dense, hidden)[:, : len(int8.tokenizer)]
        logprobs = jax.nn.log_softmax(logits)[np.arange(len(answer.tokens)), np.array(answer.tokens)]
        assert 1e-6 < np.abs(logprobs - np.array(answer.logprobs)).max() < 0.1


def test_exported_as_what_it_stands_for(int8: Qwen, folder: Path) -> None:
    exported, stored = ParamsCheckpoint(int8.params, CONFIG), load(folder, dtype="float32", progress=False)
    path = "layers/attention/o/kernel"
    out = np.empty((2, 64, 4, 16), np.float32)
    exported.read(path, tuple(slice(0, size) for size in out.shape), out)
    kernels = [np.asarray(layer["attention"]["o"]["kernel"].dense()) for layer in stored.params["layers"]]
    np.testing.assert_allclose(out, np.stack(kernels), atol=np.abs(kernels).max() / 127)


def test_bfloat16_where_there_are_no_kernels(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "_found", lambda: "there is no C compiler")
    with caplog.at_level(logging.WARNING):
        qwen = load(folder, dtype="int8", progress=False)
    assert [record.getMessage() for record in caplog.records] == [
        "int8 is not possible, because there is no C compiler; computing in bfloat16, slower and with more memory."
    ]
    assert qwen.params["final_norm"]["scale"].dtype == "bfloat16" and not qwen.backend.native
    assert qwen.generate("the", Sampling(), max_tokens=2)
