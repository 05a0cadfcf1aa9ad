"""config.json: what is read, what is refused and how, and what is written, against transformers' own configs."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from qwen_jax.checked import shown
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
        {"rope_scaling": {"type": "yarn"} | YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 256},
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

DCA = {"chunk_size": 8, "local_size": 2}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not a Qwen text model"),
        ({"model_type": ["qwen2"]}, "is not a Qwen text model"),
        ({"attention_sink": 4}, "unknown config key 'attention_sink' = 4"),
        ({"hidden_size": None}, "hidden_size is None; it must be a whole number"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"num_attention_heads": 128}, "head_dim, is 0; it must be a whole number of at least 1"),
        ({"head_dim": 15}, "head_dim=15 is odd"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; it must be a whole number of at most"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"rotary_pct": 0.5}, "rotary_pct = 0.5 is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        ({"use_mrope": True}, "use_mrope = True is not supported"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads = {'0': [1]} is not supported"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantised with 'hqq'"),
        ({"quantization_config": {"bits": 4}}, "quantised with None"),
        (
            {
                "quantization_config": {
                    "quant_method": "bitsandbytes",
                    "load_in_4bit": True,
                    "bnb_4bit_quant_type": "int4",
                }
            },
            "bnb_4bit_quant_type is 'int4'",
        ),
        ({"quantization_config": ["gptq"]}, "quantization_config is ['gptq']; it must be a mapping"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "quantization = {'bits': 4, 'group_size': 64}"),
        ({"rope_scaling": {"type": "longrope", "factor": 4}}, "rope_scaling type 'longrope' is not supported"),
        ({"rope_scaling": {"factor": 4}}, "rope_scaling type None is not supported"),
        ({"rope_parameters": {"type": "yarn", "factor": 0.5}}, "rope_parameters factor is 0.5; it must be a number of"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "short_factor": 1}}, "unknown key 'short_factor'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "truncate": False}}, "truncate=false is not supported"),
        ({"rope_scaling": {"type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is not 1"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; it must be a mapping"),
        ({"use_sliding_window": True, "sliding_window": -5, "max_window_layers": 0}, "sliding_window is -5"),
        ({"layer_types": ["sliding_attention"] * 4}, "use_sliding_window is false"),
        ({"layer_types": ["full_attention"] * 3}, "must be a list of one name for each of 4 layers"),
        ({"layer_types": ["linear_attention"] * 4}, "layer_types has 'linear_attention'"),
        ({"dual_chunk_attention_config": {"chunk_size": 8, "local_size": 8}}, "needs 0 < local_size < chunk_size"),
        ({"dual_chunk_attention_config": {"chunk_len": 8}}, "dual_chunk_attention_config has the unknown key"),
        ({"dual_chunk_attention_config": DCA, "rope_scaling": {"type": "yarn"} | YARN}, "both"),
        ({"layer_windows": 64}, "must be a list of one size, or null, for each of 4 layers"),
        ({"layer_windows": [64]}, "for each of 4 layers"),
        ({"layer_windows": [64, 64, 64, 0]}, "a size in layer_windows is 0; it must be a whole number of at least 1"),
    ],
)
def test_refusals_are_one_sentence(changes, sentence):
    with pytest.raises(InputError) as refusal:
        read(**changes)
    message = str(refusal.value)
    assert sentence in message
    assert message.endswith(".") and "\n" not in message


NO_SIZE = [0, -1, True, 4.0, 1e300, "4", [4], {}, 2**31, 10**400]
NO_NUMBER = [0, -1.0, True, "1e-6", [1e-6], {}, math.inf, -math.inf, math.nan, 10**400]
NO_FLAG = [0, 1, 0.0, "false", "true", [], {}]
OF_KIND = {
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim": NO_SIZE,
    "intermediate_size max_position_embeddings sliding_window": NO_SIZE,
    "num_experts num_experts_per_tok moe_intermediate_size": NO_SIZE,
    "max_window_layers shared_expert_intermediate_size": [value for value in NO_SIZE if value != 0],
    "rms_norm_eps rope_theta": NO_NUMBER,
    "initializer_range router_aux_loss_coef": [value for value in NO_NUMBER if value != 0],
    "use_sliding_window tie_word_embeddings norm_topk_prob": NO_FLAG,
    "rope_scaling rope_parameters dual_chunk_attention_config quantization_config": ["yarn", 5, [1], True],
}


@pytest.mark.parametrize("key", " ".join(OF_KIND).split())
def test_bad_values_are_named(key):
    """Negative, zero, not finite, of another kind, huge: key and value in one short sentence."""
    for value in next(values for keys, values in OF_KIND.items() if key in keys.split()):
        with pytest.raises(InputError) as refusal:
            ModelConfig.from_hf(QWEN2_MOE | {"use_sliding_window": True} | {key: value})
        message = str(refusal.value)
        assert key in message and shown(value) in message and len(message) < 300 and "\n" not in message, message


@pytest.mark.parametrize("key", ["factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"])
def test_bad_values_of_yarn_are_named(key):
    for value in [*NO_NUMBER, "a"]:
        with pytest.raises(InputError, match=f"rope_scaling {key} is"):
            read(rope_scaling={"type": "yarn"} | YARN | {key: value})


@pytest.mark.parametrize(
    ("mapping", "sentence"),
    [
        (QWEN1 | {"seq_length": None}, "seq_length is None"),
        (QWEN1 | {"no_bias": False}, "no_bias = False is not supported"),
        (QWEN2_MOE | {"num_experts_per_tok": 9}, "num_experts_per_tok=9 must be between 1 and 8"),
        (QWEN2_MOE | {"mlp_only_layers": [0]}, "mlp_only_layers mixes dense and sparse layers"),
        (QWEN2_MOE | {"decoder_sparse_step": 2}, "mixes dense and sparse layers"),
        (QWEN2_MOE | {"qkv_bias": False}, "qkv_bias = False is not supported"),
        (QWEN2 | {"model_type": "qwen3", "attention_bias": True}, "attention_bias = True is not supported"),
    ],
)
def test_refusals_of_one_architecture(mapping, sentence):
    with pytest.raises(InputError, match=sentence):
        ModelConfig.from_hf(mapping)


def test_load_config_names_the_file(tmp_path):
    with pytest.raises(InputError, match=r"config\.json does not exist"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(QWEN2 | {"model_type": "gpt2"}))
    with pytest.raises(InputError, match=r"config\.json: model_type 'gpt2'"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(QWEN2))
    assert load_config(tmp_path) == load_config(tmp_path / "config.json") == read()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "is not valid JSON"),
        (b"[]", r"its content is \[\]; it must be a mapping"),
        (b"null", "its content is None; it must be a mapping"),
        ("{}".encode("utf-16"), "is not text in UTF-8"),
        (b"[" * 100_000 + b"]" * 100_000, "is nested too deeply"),
        (b'{"a": ' * 100_000, "is nested too deeply"),
        (b'{"rope_theta": NaN}', "NaN is no JSON number"),
        (b'{"rope_theta": -Infinity}', "-Infinity is no JSON number"),
        (b'{"rope_theta": 1' + b"0" * 5000 + b"}", "is not valid JSON"),
        (b'{"hidden_size": 4, "hidden_size": 8}', "key 'hidden_size' is both 4 and 8"),
        (b'{"model_type": "qwen2", "dual_chunk_attention_config": 5}', "dual_chunk_attention_config is 5"),
    ],
)
def test_files_that_are_no_config(tmp_path, content, sentence):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=sentence) as refusal:
        load_config(tmp_path)
    assert "\n" not in str(refusal.value)


# --- against transformers ---------------------------------------------------------------------------------------------

BASE = read()
MOE = MoeConfig(8, 2, 32, norm_topk_prob=True, aux_loss_coef=0.1)
VARIANTS = {
    "plain": BASE,
    "tied": dataclasses.replace(BASE, tie_word_embeddings=True),
    "yarn": dataclasses.replace(BASE, rope_scaling=YarnScaling(4.0, 256, beta_fast=16.0, attention_factor=1.5)),
    "linear": dataclasses.replace(BASE, rope_scaling=LinearScaling(2.0)),
    "window": dataclasses.replace(BASE, windows=(None, None, 64, 64)),
    "window in all": dataclasses.replace(BASE, windows=(64, 64, 64, 64)),
    "ntk": dataclasses.replace(BASE, rope_scaling=NtkScaling(4.0)),
    "dual chunk": dataclasses.replace(BASE, dual_chunk=DualChunk(128, 32, 128)),
    "windows": dataclasses.replace(BASE, windows=(64, None, None, 64)),
    "qwen2 head_dim": dataclasses.replace(BASE, head_dim=32),
    "qwen2_moe": dataclasses.replace(
        BASE, model_type="qwen2_moe", moe=dataclasses.replace(MOE, shared_intermediate_size=48, norm_topk_prob=False)
    ),
    "qwen2_moe window": dataclasses.replace(
        BASE,
        model_type="qwen2_moe",
        moe=dataclasses.replace(MOE, shared_intermediate_size=48),
        windows=(64, None, 64, None),
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


def theirs(mapping: dict[str, Any]) -> dict[str, Any]:
    """What transformers' own config and modelling code make of a mapping; its exception where it refuses one."""
    import transformers

    config = transformers.AutoConfig.for_model(**mapping)
    config.standardize_rope_params()  # as when a model computes its frequencies
    kind, rope = mapping["model_type"], config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if kind == "qwen3_moe":  # whose modelling code looks at the size alone
        windows = (config.sliding_window,) * config.num_hidden_layers
    else:
        windows = tuple(config.sliding_window if t == "sliding_attention" else None for t in config.layer_types)
        assert None not in (w for w, t in zip(windows, config.layer_types, strict=True) if t == "sliding_attention")
    scaling = None
    if rope["rope_type"] == "yarn":
        scaling = YarnScaling(rope["factor"], rope["original_max_position_embeddings"])
    found = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "head_dim": head_dim,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling,
        "windows": windows if any(windows) else (),
    }
    if kind.endswith("_moe"):
        shared = config.shared_expert_intermediate_size if kind == "qwen2_moe" else 0
        experts = (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size, shared)
        found["moe"] = MoeConfig(*experts, config.norm_topk_prob, config.router_aux_loss_coef)
    return found


ABSENT = object()
WINDOWED = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}
SPELLINGS: dict[str, dict[str, Any]] = {
    **{f"no {key}": {key: ABSENT} for key in (*QWEN2_MOE, "head_dim") if key != "model_type"},
    **{f"{key} null": {key: None} for key in ("head_dim", "rope_scaling", "layer_types", "mlp_only_layers", "dtype")},
    **{f"window from {first}": WINDOWED | {"max_window_layers": first} for first in (0, 1, 4, 9)},
    "window defaults": {"use_sliding_window": True, "num_hidden_layers": 30},
    "window null": WINDOWED | {"sliding_window": None, "max_window_layers": 0},
    "window not used": {"sliding_window": 64},
    "layer_types": WINDOWED | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "layer_types in all": WINDOWED | {"layer_types": ["sliding_attention"] * 4},
    "layer_types, old name": WINDOWED | {"layer_types": ["attention"] * 3 + ["sliding_attention"]},
    "layer_types, no window": {"layer_types": ["full_attention"] * 4},
    "theta in parameters": {"rope_theta": ABSENT, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
    "theta in both": {"rope_theta": 7e6, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
    "theta beside parameters": {"rope_theta": 7e6, "rope_parameters": {"rope_type": "default"}},
    "theta nowhere": {"rope_theta": ABSENT, "rope_parameters": {"rope_type": "default"}},
    "theta in scaling": {"rope_theta": 7e6, "rope_scaling": {"type": "yarn", "rope_theta": 5e6} | YARN},
    "theta an int": {"rope_theta": 1000000},
    "yarn": {"rope_scaling": {"type": "yarn"} | YARN},
    "yarn, no length": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "yarn, length outside": {"rope_scaling": {"type": "yarn"} | YARN, "original_max_position_embeddings": 128},
    "yarn, both names": {"rope_scaling": {"type": "yarn", "rope_type": "default"}},
    "scaling before parameters": {
        "rope_theta": ABSENT,
        "rope_scaling": {"type": "yarn"} | YARN,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6},
    },
    "scaling empty": {"rope_scaling": {}, "rope_parameters": {"rope_type": "yarn", "rope_theta": 5e6} | YARN},
    "two counts of experts": {"num_local_experts": 4},
    "both dtypes": {"dtype": "float32", "torch_dtype": "bfloat16"},
    "use_mrope false": {"use_mrope": False},
    "old defaults": {"pruned_heads": {}, "torchscript": False, "temperature": 1.0, "is_decoder": False, "top_k": 50},
    "bias flags": {"qkv_bias": True},
    "quantization off": {"quantization_config": None},
    "tools": {"unsloth_fixed": True, "unsloth_version": "2025.3", "transformers.js_config": {"dtype": "q4"}},
    "where it was": {"_name_or_path": "x/y", "_attn_implementation_autoset": True, "auto_map": {"AutoConfig": "a.B"}},
}


@pytest.mark.parametrize("model_type", [t for t in MODEL_TYPES if t != "qwen"])
@pytest.mark.parametrize("changes", SPELLINGS.values(), ids=SPELLINGS)
def test_as_transformers_reads_it(model_type, changes):
    """Every key, absent, null or doubled: what transformers makes of it, or a refusal where it refuses."""
    pytest.importorskip("transformers")
    mapping = (QWEN2_MOE if model_type.endswith("_moe") else QWEN2) | {"model_type": model_type} | changes
    mapping = {key: value for key, value in mapping.items() if value is not ABSENT}
    try:
        expected = theirs(json.loads(json.dumps(mapping)))
    except Exception:  # of many types, from validation as from arithmetic on None
        with pytest.raises(InputError):
            ModelConfig.from_hf(mapping)
        return
    if expected["num_heads"] % expected["num_kv_heads"]:  # the default of another size; no attention comes out of it
        with pytest.raises(InputError, match="not a multiple of num_key_value_heads"):
            ModelConfig.from_hf(mapping)
        return
    found = vars(ModelConfig.from_hf(mapping))
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("model_type", [t for t in MODEL_TYPES if t != "qwen"])
def test_default_config_of_transformers_is_read(model_type):
    """Every key that transformers writes today is known."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(model_type)
    config = ModelConfig.from_hf(theirs.to_dict())
    assert (config.hidden_size, config.num_layers) == (theirs.hidden_size, theirs.num_hidden_layers)
