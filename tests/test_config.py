"""ModelConfig: what it reads, what it refuses and how, and what it writes, against transformers' own configs."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from qwen_jax.config import (
    MODEL_TYPES,
    DualChunk,
    DynamicNtkScaling,
    LinearScaling,
    ModelConfig,
    MoeConfig,
    NtkScaling,
    YarnScaling,
    load_config,
)
from qwen_jax.errors import InputError

QWEN2: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
QWEN1: dict[str, Any] = {
    "model_type": "qwen",
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "intermediate_size": 192,
    "seq_length": 128,
}
QWEN2_MOE = QWEN2 | {
    "model_type": "qwen2_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 256}


def read(**changes: Any) -> ModelConfig:
    return ModelConfig.from_hf(QWEN2 | changes)


# --- rope -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_scaling": {"type": "yarn"} | YARN},
        {"rope_scaling": {"rope_type": "yarn"} | YARN},
        {"rope_scaling": {"type": "yarn", "rope_type": "yarn"} | YARN},
        {"rope_theta": None, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6} | YARN},
    ],
)
def test_every_spelling_of_yarn(spelling):
    config = read(**spelling)
    assert config.rope_scaling == YarnScaling(factor=4.0, original_length=256)
    assert config.rope_theta == 1e6


def test_yarn_without_a_length_extends_the_declared_one():
    assert read(rope_scaling={"type": "yarn", "factor": 2}).rope_scaling == YarnScaling(2.0, 1024)


def test_yarn_options_are_kept():
    options = {"beta_fast": 16, "beta_slow": 2, "attention_factor": 1.5, "mscale": 0.7, "mscale_all_dim": 0.9}
    expected = YarnScaling(4.0, 256, 16.0, 2.0, 1.5, 0.7, 0.9)
    assert read(rope_scaling={"type": "yarn"} | YARN | options).rope_scaling == expected


def test_linear_and_default():
    assert read(rope_scaling={"type": "linear", "factor": 2}).rope_scaling == LinearScaling(2.0)
    plain = read(rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 5e6})
    assert (plain.rope_scaling, plain.rope_theta) == (None, 5e6)


def test_dual_chunk():
    declared = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
    config = read(dual_chunk_attention_config=declared)
    assert config.dual_chunk == DualChunk(262144, 8192, 262144)
    assert config.dual_chunk.chunk_length == 253952
    assert config.to_hf()["dual_chunk_attention_config"] == declared


# --- Qwen1 ------------------------------------------------------------------------------------------------------------


def test_qwen1_widths_and_training_free_scaling():
    config = ModelConfig.from_hf(QWEN1 | {"use_dynamic_ntk": True, "use_logn_attn": True})
    assert (config.intermediate_size, config.num_kv_heads, config.head_dim, config.rope_theta) == (96, 4, 16, 10000.0)
    assert (config.rope_scaling, config.logn_trained_length) == (DynamicNtkScaling(128), 128)
    off = ModelConfig.from_hf(QWEN1 | {"use_dynamic_ntk": False, "use_logn_attn": False})
    assert (off.rope_scaling, off.logn_trained_length) == (None, None)


def test_qwen1_scaling_is_on_when_the_file_is_silent():
    """The defaults of the released QWenConfig."""
    config = ModelConfig.from_hf(QWEN1)
    assert (config.rope_scaling, config.logn_trained_length) == (DynamicNtkScaling(128), 128)


def test_qwen1_old_key_names():
    old = {
        "model_type": "qwen",
        "padded_vocab_size": 512,
        "n_embd": 64,
        "n_layer": 4,
        "n_head": 4,
        "kv_channels": 16,
        "ffn_hidden_size": 192,
        "n_positions": 256,
        "layer_norm_epsilon": 1e-5,
        "rotary_emb_base": 20000,
        "seq_length": 128,
    }
    new = QWEN1 | {"max_position_embeddings": 256, "layer_norm_epsilon": 1e-5, "rotary_emb_base": 20000}
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not a Qwen text model"),
        ({"model_type": None}, "model_type None is not a Qwen text model"),
        ({"attention_sink": 4}, "unknown config key 'attention_sink' = 4"),
        ({"hidden_size": None}, "config lacks hidden_size"),
        ({"hidden_size": 0}, "hidden_size is 0; it must be a whole number"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4'; it must be a whole number"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"head_dim": 15}, "head_dim=15 is odd"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias=true"),
        ({"qkv_bias": False}, "qkv_bias=false is not supported"),
        ({"rotary_pct": 0.5}, "rotary_pct 0.5 is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised with 'fp8'"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers mixes dense and sparse layers"),
        ({"layer_types": ["sliding_attention"] + ["full_attention"] * 3}, "layer_types does not follow"),
        ({"rope_scaling": {"type": "longrope", "factor": 4}}, "rope_scaling type 'longrope' is not supported"),
        ({"rope_scaling": {"factor": 4}}, "rope_scaling type None is not supported"),
        ({"rope_scaling": {"type": "mrope", "rope_type": "default"}}, "keep the one that is meant"),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "factor is 0.5; it must be a number of at least 1"),
        ({"rope_scaling": {"type": "yarn"}}, "factor is None; it must be a number of at least 1"),
        ({"rope_scaling": {"type": "yarn", "factor": "four"}}, "factor is 'four'; it must be a number"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "attn_factor": 1}}, "unknown key 'attn_factor'"),
        ({"rope_scaling": {"type": "default", "mrope_section": [1]}}, "unknown key 'mrope_section'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "truncate": False}}, "truncate=false is not supported"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; it must be a mapping"),
        ({"rope_scaling": {"type": "yarn"} | YARN, "rope_parameters": {"rope_type": "default"}}, "keep one."),
        ({"dual_chunk_attention_config": {"chunk_size": 8, "local_size": 8}}, "needs 0 < local_size < chunk_size"),
        ({"dual_chunk_attention_config": {"chunk_len": 8}}, "dual_chunk_attention_config has the unknown key"),
        (
            {
                "dual_chunk_attention_config": {"chunk_size": 8, "local_size": 2},
                "rope_scaling": {"type": "yarn"} | YARN,
            },
            "both",
        ),
        ({"layer_windows": 64}, "must be a list of one size, or null, per layer"),
        ({"layer_windows": [64]}, "for each of the 4 layers"),
        ({"layer_windows": [64, 64, 64, 0]}, "one size of at least 1"),
    ],
)
def test_refusals_are_one_sentence(changes, sentence):
    with pytest.raises(InputError) as refusal:
        read(**changes)
    message = str(refusal.value)
    assert sentence in message
    assert message.endswith(".") and "\n" not in message


@pytest.mark.parametrize(
    ("mapping", "sentence"),
    [
        (QWEN1 | {"seq_length": None}, "config lacks seq_length"),
        (QWEN2_MOE | {"num_experts": None}, "config lacks num_experts, which this mixture"),
        (QWEN2_MOE | {"shared_expert_intermediate_size": None}, "config lacks shared_expert_intermediate_size"),
        (QWEN2_MOE | {"num_experts_per_tok": 9}, "num_experts_per_tok=9 must be between 1 and 8"),
    ],
)
def test_refusals_of_one_architecture(mapping, sentence):
    with pytest.raises(InputError, match=sentence):
        ModelConfig.from_hf(mapping)


def test_load_config_names_the_file(tmp_path):
    with pytest.raises(InputError, match=r"config\.json does not exist"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not valid JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(QWEN2 | {"model_type": "gpt2"}))
    with pytest.raises(InputError, match=r"config\.json: model_type 'gpt2'"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(QWEN2))
    assert load_config(tmp_path) == load_config(tmp_path / "config.json") == read()


# --- against transformers ---------------------------------------------------------------------------------------------

BASE = read()
MOE = MoeConfig(8, 2, 32, norm_topk_prob=True, aux_loss_coef=0.1)
VARIANTS = {
    "plain": BASE,
    "tied": dataclasses.replace(BASE, tie_word_embeddings=True),
    "yarn": dataclasses.replace(BASE, rope_scaling=YarnScaling(4.0, 256, beta_fast=16.0, attention_factor=1.5)),
    "linear": dataclasses.replace(BASE, rope_scaling=LinearScaling(2.0)),
    "window": dataclasses.replace(BASE, sliding_window=64, first_window_layer=2),
    "window in all": dataclasses.replace(BASE, sliding_window=64, first_window_layer=0),
    "ntk": dataclasses.replace(BASE, rope_scaling=NtkScaling(4.0)),
    "dual chunk": dataclasses.replace(BASE, dual_chunk=DualChunk(128, 32, 128)),
    "windows": dataclasses.replace(BASE, window_sizes=(64, *[None] * (BASE.num_layers - 1))),
    "qwen2 head_dim": dataclasses.replace(BASE, head_dim=32),
    "qwen2_moe": dataclasses.replace(
        BASE, model_type="qwen2_moe", moe=dataclasses.replace(MOE, shared_intermediate_size=48, norm_topk_prob=False)
    ),
    "qwen2_moe window": dataclasses.replace(
        BASE,
        model_type="qwen2_moe",
        moe=dataclasses.replace(MOE, shared_intermediate_size=48),
        sliding_window=64,
        first_window_layer=3,
    ),
    "qwen3": dataclasses.replace(BASE, model_type="qwen3", head_dim=32),
    "qwen3_moe": dataclasses.replace(BASE, model_type="qwen3_moe", moe=MOE, head_dim=32),
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_round_trip_alone_and_through_transformers(config):
    assert ModelConfig.from_hf(config.to_hf()) == config
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(**config.to_hf())
    assert ModelConfig.from_hf(theirs.to_dict()) == config
    assert ModelConfig.from_hf(json.loads(theirs.to_json_string())) == config  # what save_pretrained writes


@pytest.mark.parametrize("model_type", ["qwen2", "qwen2_moe", "qwen3"])
@pytest.mark.parametrize("first", [0, 2, 4])
def test_windowed_layers_are_those_of_transformers(model_type, first):
    transformers = pytest.importorskip("transformers")
    mapping = (QWEN2_MOE if model_type == "qwen2_moe" else QWEN2) | {"model_type": model_type}
    mapping |= {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": first}
    windows = ModelConfig.from_hf(mapping).layer_windows()
    theirs = transformers.AutoConfig.for_model(**mapping).layer_types
    assert ["sliding_attention" if window else "full_attention" for window in windows] == theirs


def test_window_defaults_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = read(use_sliding_window=True, num_hidden_layers=30)
    theirs = transformers.Qwen2Config(use_sliding_window=True, num_hidden_layers=30)
    assert config.sliding_window == theirs.sliding_window
    assert config.first_window_layer == theirs.max_window_layers
    assert read(sliding_window=64).sliding_window is None  # inert without the switch


@pytest.mark.parametrize("model_type", [t for t in MODEL_TYPES if t != "qwen"])
def test_default_config_of_transformers_is_read(model_type):
    """Every key that transformers writes today is known."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(model_type)
    config = ModelConfig.from_hf(theirs.to_dict())
    assert (config.hidden_size, config.num_layers) == (theirs.hidden_size, theirs.num_hidden_layers)
