"""Prompts read in pieces: the same cache and answers as read whole, in memory that does not grow with the prompt."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer import decode
from infer.decode import PIECE, prefill
from infer.qwen import Qwen
from infer.sampling import Sampling
from qwen_jax.config import DualChunk, YarnScaling
from qwen_jax.kernels import plain
from qwen_jax.model import init, unstack
from tests.infer import tiny

CONFIGS = {
    "plain": tiny.CONFIG,
    "yarn": dataclasses.replace(tiny.CONFIG, rope_scaling=YarnScaling(4.0, 64)),
    "dual_chunk": dataclasses.replace(tiny.CONFIG, dual_chunk=DualChunk(56, 16, 64)),
    "qwen1": tiny.QWEN1_CONFIG,
    "windows": dataclasses.replace(tiny.CONFIG, windows=(20, None)),
}
LENGTHS = np.array([150, 64, 3], np.int32)
TOKENS = np.random.default_rng(5).integers(0, 256, (3, 150)).astype(np.int32)


def read(config, params, piece, tokens=TOKENS, lengths=LENGTHS):
    limits, never = np.full(len(lengths), 8, np.int32), np.array([-1], np.int32)
    fixed = {"config": config, "vocab_size": 263, "num_top": 2}
    return prefill(params, tokens, lengths, limits, None, never, capacity=tokens.shape[1] + 20, piece=piece, **fixed)


@pytest.mark.parametrize(
    ("name", "stacked"), [(name, False) for name in CONFIGS] + [("dual_chunk", True)], ids=lambda x: str(x)
)
def test_pieces_are_the_whole(name, stacked, monkeypatch):
    monkeypatch.setattr(plain, "KEY_BLOCK", 48)  # blocks that fit neither the pieces nor the 170 slots
    config = CONFIGS[name]
    params = init(config, jax.random.key(0))
    params = params if stacked else unstack(params)
    (whole, first), (pieces, same) = (read(config, params, piece) for piece in (160, 40))
    np.testing.assert_array_equal(first.tokens, same.tokens)
    np.testing.assert_allclose(first.top_logprobs, same.top_logprobs, atol=1e-4)
    for name in ("lengths", "prompt_lengths"):
        np.testing.assert_array_equal(getattr(whole.cache, name), getattr(pieces.cache, name))
    held = np.arange(170)[None] < LENGTHS[:, None]  # [B, S]; what lies behind is overwritten before it is read
    caches = (jax.tree.leaves((state.cache.k, state.cache.v)) for state in (whole, pieces))
    for a, b in zip(*caches, strict=True):
        a, b = (np.moveaxis(np.asarray(x), -3, -2)[..., held, :, :] for x in (a, b))
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_long_prompts_are_read_in_pieces(monkeypatch):
    """Without being asked to, from one token more than a piece has; the answer is that of reading whole."""
    read_in_pieces, count = decode.read_in_pieces, []
    monkeypatch.setattr(
        decode, "read_in_pieces", lambda *args, **kw: count.append(kw["piece"]) or read_in_pieces(*args, **kw)
    )
    config = dataclasses.replace(tiny.CONFIG, max_position_embeddings=4 * PIECE)
    params = init(config, jax.random.key(0))
    model = Qwen(config, params, tiny.tokenizer())
    prompt = np.random.default_rng(6).integers(0, 256, PIECE + 1)
    model.generate([prompt[:PIECE].tolist()], Sampling(), max_tokens=1)
    assert count == []
    answer = model.generate([prompt.tolist()], Sampling(), max_tokens=1)[0]
    assert count == [PIECE]
    whole = read(config, model.params, 2 * PIECE, prompt[None], np.array([PIECE + 1], np.int32))[1]
    assert answer.tokens == whole.tokens[0].tolist()
    np.testing.assert_allclose(answer.logprobs, whole.logprobs[0], atol=2e-4)


@pytest.mark.parametrize("name", ["plain", "dual_chunk"])
def test_memory_does_not_grow_with_the_prompt(name):
    config = dataclasses.replace(CONFIGS[name], max_position_embeddings=2**20)
    params = unstack(init(config, jax.random.key(0)))

    def temporaries(length: int, piece: int) -> int:
        lowered = prefill.lower(
            params,
            jax.ShapeDtypeStruct((1, length), jnp.int32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
            None,
            jax.ShapeDtypeStruct((1,), jnp.int32),
            config=config,
            vocab_size=263,
            num_top=0,
            capacity=length,
            piece=piece,
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes

    whole = [temporaries(length, piece=2**20) for length in (8192, 32768)]
    pieces = [temporaries(length, piece=1024) for length in (8192, 32768)]
    assert whole[1] > 3 * whole[0]
    assert pieces[1] < 1.1 * pieces[0]
