"""A small tokenizer and small models with random or prescribed behaviour, for the tests of what uses a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from infer.qwen import Qwen
from qwen_jax.config import DynamicNtkScaling, ModelConfig
from qwen_jax.model import Params, init
from qwen_jax.tokenizer import Tokenizer
from qwen_jax.weights.export import save_hf
from qwen_jax.weights.load import ParamsCheckpoint

VOCAB_ROWS = 320  # the tokenizer has 263
# with a large initializer_range a random model's greedy answers do not settle on one token
CONFIG = ModelConfig(
    model_type="qwen2",
    vocab_size=VOCAB_ROWS,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_position_embeddings=512,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    initializer_range=0.3,
)
TRAINED = 32
QWEN1_CONFIG = dataclasses.replace(
    CONFIG,
    model_type="qwen",
    num_kv_heads=4,
    rope_scaling=DynamicNtkScaling(trained_length=TRAINED),
    logn_trained_length=TRAINED,
)


def tokenizer() -> Tokenizer:
    """All bytes, four merges and ChatML's special tokens."""
    merges = [("t", "h"), ("h", "e"), ("i", "n"), ("e", "r")]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    backend = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return Tokenizer(backend, eos_ids=[backend.token_to_id("<|im_end|>")])


def scripted(script: str, following: str = "<|im_end|>") -> Qwen:
    """A chat model that answers, after the prompt "?", exactly `script`, whose tokens must all differ.

    The layers add nothing, so each token's hidden state is its own embedding, and the head knows what follows it.
    """
    config = dataclasses.replace(CONFIG, hidden_size=256)
    params = init(config, jax.random.key(1))
    for block, leaf in (("attention", "o"), ("mlp", "down")):
        params["layers"][block][leaf]["kernel"] *= 0
    ids = tokenizer().encode("?" + script + following)
    assert len(set(ids)) == len(ids)
    embedding = params["embed"]["embedding"]
    head = jnp.zeros_like(embedding).at[jnp.array(ids[1:])].set(embedding[jnp.array(ids[:-1])])
    params["lm_head"]["embedding"] = head
    return Qwen(config, params, tokenizer())


def save_folder(folder: Path, config: ModelConfig, params: Params) -> Path:
    """A model folder as Hugging Face has it, the tokenizer included."""
    save_hf(ParamsCheckpoint(params, config), folder, progress=False)
    tokenizer().save(folder)
    return folder
