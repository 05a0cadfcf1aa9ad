"""Every config.json that is known to be published, as far as its keys differ: each opens, as transformers reads it.

Qwen's own, and well-known fine-tunes of Qwen with what their makers' tools add.
"""

from __future__ import annotations

from typing import Any

import pytest

from qwen_jax.config import DynamicNtkScaling, ModelConfig
from tests.test_hf_config import theirs


def qwen2(
    hidden: int, layers: int, heads: int, kv: int, width: int, vocab: int = 151936, **more: Any
) -> dict[str, Any]:
    """The keys that all releases from Qwen1.5 to Qwen2.5 have."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": width,
        "max_position_embeddings": 32768,
        "max_window_layers": layers,
        "model_type": "qwen2",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocab,
        **more,
    }


def qwen3(hidden: int, layers: int, heads: int, kv: int, width: int, **more: Any) -> dict[str, Any]:
    mapping = qwen2(hidden, layers, heads, kv, width)
    mapping |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "max_position_embeddings": 40960}
    mapping |= {"attention_bias": False, "head_dim": 128, "rope_scaling": None, "rope_theta": 1000000}
    return mapping | {"sliding_window": None, "transformers_version": "4.51.0"} | more


FULL = {"layer_types": ["full_attention"] * 28}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
BNB_OFF = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False, "bnb_4bit_quant_type": "fp4"}
RELEASED: dict[str, dict[str, Any]] = {
    "Qwen1.5-0.5B": qwen2(1024, 24, 16, 16, 2816, max_window_layers=21, sliding_window=32768, tie_word_embeddings=True),
    "Qwen2-0.5B": qwen2(896, 24, 14, 2, 4864, max_position_embeddings=131072, tie_word_embeddings=True),
    "Qwen2.5-0.5B": qwen2(
        *(896, 24, 14, 2, 4864),
        use_mrope=False, eos_token_id=151643, sliding_window=32768, tie_word_embeddings=True,
    ),
    "Qwen2.5-1.5B": qwen2(1536, 28, 12, 2, 8960, use_mrope=False, tie_word_embeddings=True),
    "Qwen2.5-7B": qwen2(3584, 28, 28, 4, 18944, 152064, use_mrope=False, max_position_embeddings=131072),
    "Qwen2.5-32B-Instruct": qwen2(5120, 64, 40, 8, 27648, 152064, max_window_layers=70),
    "Qwen2.5-Math-7B": qwen2(3584, 28, 28, 4, 18944, 152064, max_position_embeddings=4096, rope_theta=10000,
                             sliding_window=4096, use_mrope=False),
    "Qwen2.5-7B with YaRN": qwen2(3584, 28, 28, 4, 18944, 152064, rope_scaling=YARN),
    "saved by transformers 4.48": qwen2(896, 24, 14, 2, 4864, _name_or_path="Qwen/Qwen2.5-0.5B", pad_token_id=151643,
                                        rope_scaling=None, sliding_window=None, use_mrope=False),
    "saved by transformers 4.57": qwen2(1536, 28, 12, 2, 8960, dtype="bfloat16", **FULL),
    "saved by transformers 5": qwen2(1536, 28, 12, 2, 8960, pad_token_id=None, use_mrope=False, sliding_window=None,
                                     rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"}, **FULL),
    "Qwen3-32B": qwen3(5120, 64, 64, 8, 25600),
    "Qwen3-Embedding-0.6B": qwen3(1024, 28, 16, 8, 3072, eos_token_id=151643, tie_word_embeddings=True,
                                  max_position_embeddings=32768, vocab_size=151669),
    "Qwen3-0.6B-Base, tuned": qwen3(1024, 28, 16, 8, 3072, torch_dtype="float32", use_cache=False, **FULL),
    "DeepSeek-R1-Distill-Qwen-1.5B": qwen2(
        *(1536, 28, 12, 2, 8960),
        bos_token_id=151646, eos_token_id=151643, max_position_embeddings=131072, max_window_layers=21,
        rope_theta=10000, sliding_window=4096, use_mrope=False,
    ),
    "DeepSeek-R1-0528-Qwen3-8B": qwen3(4096, 36, 32, 8, 12288, max_position_embeddings=131072, rope_scaling={
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
        "attn_factor": 0.8782488562869419,
    }),
    "of unsloth": qwen2(896, 24, 14, 2, 4864, unsloth_fixed=True, unsloth_version="2025.3.19", pad_token_id=151654,
                        _attn_implementation_autoset=True),
    "of transformers.js": qwen2(896, 24, 14, 2, 4864, **{"transformers.js_config": {"use_external_data_format": True}}),
    "of ONNX exporters": qwen2(896, 24, 14, 2, 4864, return_dict=True, output_attentions=False, is_decoder=True),
    "of old transformers": qwen2(
        *(896, 24, 14, 2, 4864),
        pruned_heads={}, torchscript=False, tf_legacy_loss=False, use_bfloat16=False, temperature=1.0, top_k=50,
        top_p=1.0, typical_p=1.0, repetition_penalty=1.0, length_penalty=1.0, no_repeat_ngram_size=0, num_beams=1,
        num_beam_groups=1, diversity_penalty=0.0, num_return_sequences=1, do_sample=False, early_stopping=False,
        max_length=20, min_length=0, bad_words_ids=None, suppress_tokens=None, begin_suppress_tokens=None,
        forced_bos_token_id=None, forced_eos_token_id=None, remove_invalid_values=False, output_scores=False,
        return_dict_in_generate=False, exponential_decay_length_penalty=None, encoder_no_repeat_ngram_size=0,
        decoder_start_token_id=None, sep_token_id=None, prefix=None, task_specific_params=None, finetuning_task=None,
        problem_type=None, id2label={"0": "LABEL_0", "1": "LABEL_1"}, label2id={"LABEL_0": 0, "LABEL_1": 1},
        tokenizer_class=None, is_encoder_decoder=False, add_cross_attention=False, tie_encoder_decoder=False,
        cross_attention_hidden_size=None, chunk_size_feed_forward=0, output_hidden_states=False,
    ),
    "with remote code": qwen2(896, 24, 14, 2, 4864, auto_map={"AutoModelForCausalLM": "modeling_qwen2.Model"}),
    "quantisation off": qwen2(896, 24, 14, 2, 4864, quantization_config=BNB_OFF),
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs_open(name):
    pytest.importorskip("transformers")
    found = vars(ModelConfig.from_hf(RELEASED[name]))
    expected = theirs(dict(RELEASED[name]))
    assert {key: found[key] for key in expected} == expected


# before Qwen-7B was released again with the usual names
QWEN_7B_OF_AUGUST_2023: dict[str, Any] = {
    "activation": "swiglu",
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "attn_pdrop": 0.0,
    "bf16": False,
    "bias_dropout_fusion": True,
    "bos_token_id": 151643,
    "embd_pdrop": 0.0,
    "eos_token_id": 151643,
    "ffn_hidden_size": 22016,
    "fp16": False,
    "fp32": False,
    "initializer_range": 0.02,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "model_type": "qwen",
    "n_embd": 4096,
    "n_head": 32,
    "n_layer": 32,
    "n_positions": 8192,
    "no_bias": True,
    "onnx_safe": None,
    "padded_vocab_size": 151936,
    "params_dtype": "torch.bfloat16",
    "pos_emb": "rotary",
    "resid_pdrop": 0.1,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "tokenizer_type": "QWenTokenizer",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "use_flash_attn": "auto",
    "vocab_size": 151936,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
}


def test_the_first_qwen_7b():
    config = ModelConfig.from_hf(QWEN_7B_OF_AUGUST_2023)
    assert (config.hidden_size, config.num_layers, config.num_heads, config.head_dim) == (4096, 32, 32, 128)
    assert (config.intermediate_size, config.vocab_size, config.max_position_embeddings) == (11008, 151936, 8192)
    assert (config.rope_scaling, config.logn_trained_length) == (DynamicNtkScaling(2048), 2048)
