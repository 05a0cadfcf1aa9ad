"""Whole small models far beyond their trained length, against PyTorch; and layer-wise windows by what they reach."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.config import DynamicNtkScaling, ModelConfig, NtkScaling, RopeScaling, YarnScaling
from qwen_jax.model import Inputs, forward, init, unstack
from tests.infer import tiny

TOKENS = np.random.default_rng(3).integers(0, 256, (1, 1000)).astype(np.int32)


@pytest.mark.parametrize(
    ("model_type", "scaling", "logn"),
    [("qwen2", YarnScaling(4.0, 128), None), ("qwen", DynamicNtkScaling(64), 64)],
    ids=["yarn", "ntk_and_logn"],
)
def test_far_beyond_the_original_length(model_type, scaling: RopeScaling, logn: int | None, tmp_path):
    """1000 tokens: twice what YaRN makes of 128, and 16 times what Qwen1's schemes start from."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from infer import parity, torch_reference
    from qwen_jax.weights.load import load_params
    from qwen_jax.weights.open import open_checkpoint

    base = torch_reference.variants(model_type)["plain"].config
    config = dataclasses.replace(base, rope_scaling=scaling, logn_trained_length=logn, max_position_embeddings=512)
    torch_reference.write_random(torch_reference.Variant(config), tmp_path)
    expected = torch_reference.trace(torch_reference.load(tmp_path), TOKENS)
    params = load_params(open_checkpoint(tmp_path), np.float32, progress=False)
    measures, _ = parity.compare_traces(expected, parity.trace(config, params, TOKENS), limits=True)
    assert [measure for measure in measures if not measure.holds] == []
    # the test can tell: with another scaling something else comes out
    other = parity.trace(dataclasses.replace(config, rope_scaling=NtkScaling(2.0)), params, TOKENS)
    assert parity.compare_traces(expected, other)[0][-3].value > 0.01


@pytest.mark.parametrize("stacked", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize(("windows", "reach"), [((5, 9), 4 + 8), ((5, None), None)])
def test_layer_windows_by_their_reach(windows, reach, stacked):
    """Through two layers of windows 5 and 9 a change reaches 4 + 8 tokens further, and through a full one all."""
    config: ModelConfig = dataclasses.replace(tiny.CONFIG, windows=windows)
    params = init(config, jax.random.key(0))
    params = params if stacked else unstack(params)
    tokens, at = jnp.asarray(TOKENS[:, :60]), 20
    before = forward(config, params, Inputs.training(tokens)).hidden
    after = forward(config, params, Inputs.training(tokens.at[0, at].set(300))).hidden
    changed = np.flatnonzero(np.any(np.abs(before - after) > 1e-6, axis=-1)[0])
    assert changed.tolist() == list(range(at, 60 if reach is None else at + reach + 1))
