"""The keys of Hugging Face's `config.json`: defaults, other spellings, and those that change nothing."""

from __future__ import annotations

from typing import Any

# What an absent key means: QWenConfig, Qwen2Config, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig
_QWEN1 = dict(
    vocab_size=151936, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=22016,
    kv_channels=128, max_position_embeddings=8192, layer_norm_epsilon=1e-6, rotary_emb_base=10000,
)  # fmt: skip
_QWEN2 = dict(
    vocab_size=151936, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
    intermediate_size=22016, max_position_embeddings=32768, rms_norm_eps=1e-6, sliding_window=4096,
    max_window_layers=28,
)  # fmt: skip
_MOE = dict(hidden_size=2048, num_hidden_layers=24)
DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen": _QWEN1,
    "qwen2": _QWEN2,
    "qwen3": _QWEN2 | dict(head_dim=128),
    "qwen2_moe": _QWEN2 | _MOE | dict(
        num_attention_heads=16, num_key_value_heads=16, intermediate_size=5632, moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632, num_experts=60, num_experts_per_tok=4,
    ),
    "qwen3_moe": _QWEN2 | _MOE | dict(
        num_key_value_heads=4, intermediate_size=6144, moe_intermediate_size=768, num_experts=128,
        num_experts_per_tok=8,
    ),
}  # fmt: skip

# other spelling -> the usual one; where a file has both, the other one counts
ALIASES = {
    "qwen": {
        "padded_vocab_size": "vocab_size", "n_embd": "hidden_size", "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads", "ffn_hidden_size": "intermediate_size",
        "n_positions": "max_position_embeddings", "layernorm_epsilon": "layer_norm_epsilon",
    },
    "qwen3_moe": {"num_local_experts": "num_experts"},
}  # fmt: skip

READ = frozenset(
    """vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size
    max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters original_max_position_embeddings
    tie_word_embeddings use_sliding_window sliding_window max_window_layers layer_types layer_windows
    dual_chunk_attention_config num_experts num_local_experts num_experts_per_tok moe_intermediate_size
    shared_expert_intermediate_size norm_topk_prob router_aux_loss_coef decoder_sparse_step mlp_only_layers
    quantization_config initializer_range kv_channels layer_norm_epsilon layernorm_epsilon rotary_emb_base seq_length
    use_dynamic_ntk use_logn_attn padded_vocab_size n_embd n_layer n_head ffn_hidden_size n_positions
    transformers_weights model_type""".split()
)

# Keys that do not change what the network computes at inference: of training, of generation (transformers drops them
# from a config too), of file formats, and of tools
IGNORED = frozenset(
    """architectures attention_dropout attn_dropout_prob attn_implementation attn_pdrop auto_map begin_suppress_tokens
    bad_words_ids bf16 bias_dropout_fusion bos_token bos_token_id chunk_size_feed_forward classifier_dropout
    cross_attention_hidden_size custom_pipelines decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping emb_dropout_prob embd_pdrop encoder_no_repeat_ngram_size encoder_repetition_penalty eos_token
    eos_token_id epsilon_cutoff eta_cutoff exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id fp16 fp32 gradient_checkpointing id2label ignore_pad_tokens is_decoder
    keys_to_ignore_at_inference kv_channels_per_head label2id length_penalty max_length max_new_tokens
    max_sequence_length min_length model_max_length n_inner name_or_path no_repeat_ngram_size num_assistant_tokens
    num_assistant_tokens_schedule num_beam_groups num_beams num_labels num_return_sequences onnx_safe
    output_attentions output_hidden_states output_router_logits output_scores pad_token pad_token_id params_dtype
    pos_emb prefix presence_penalty pretraining_tp problem_type remove_invalid_values repetition_penalty resid_pdrop
    return_dict return_dict_in_generate router_jitter_noise sep_token_id seq_len softmax_in_fp32
    sparse_attention_config suppress_tokens task_specific_params temperature tf_legacy_loss tie_last_hidden_states
    tokenizer_class tokenizer_padding_side tokenizer_type top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version typical_p unk_token_id use_bfloat16 use_cache use_cache_kernel use_cache_quantization
    use_flash_attn use_flash_attention_2 use_return_dict vocab_file activation""".split()
)
TOOLS = ("_", "unsloth_")  # what these begin is a tool's marker

# Keys that stand for another network, unless they have this value
_OFF: dict[str, Any] = {
    "add_cross_attention": False,
    "apply_residual_connection_post_layernorm": False,
    "is_encoder_decoder": False,
    "partial_rotary_factor": 1.0,
    "per_layer_config": {},
    "pruned_heads": {},
    "quantization": {},
    "rotary_pct": 1.0,
    "tie_encoder_decoder": False,
    "use_mrope": False,
}
OFF_OF: dict[str, dict[str, Any]] = {
    "qwen": _OFF | {"no_bias": True, "scale_attn_weights": True},
    # transformers fixes these biases in Qwen2 and reads neither key; the names of the stored tensors decide
    "qwen2": _OFF | {"hidden_act": "silu"},
    "qwen2_moe": _OFF | {"hidden_act": "silu", "qkv_bias": True},
    "qwen3": _OFF | {"hidden_act": "silu", "attention_bias": False},
    "qwen3_moe": _OFF | {"hidden_act": "silu", "attention_bias": False},
}
UNREAD = frozenset("hidden_act attention_bias qkv_bias no_bias scale_attn_weights".split())  # where OFF_OF lacks them

# rope_scaling type -> the other keys it may have
ROPE_KEYS = {
    # the three position axes of a vision model are one for text
    "default": frozenset({"mrope_section"}),
    "linear": frozenset({"factor"}),
    "ntk": frozenset({"factor"}),
    "yarn": frozenset(
        """factor original_max_position_embeddings beta_fast beta_slow attention_factor mscale mscale_all_dim
        truncate attn_factor""".split()
    ),
}
