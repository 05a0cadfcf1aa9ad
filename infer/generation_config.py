"""A checkpoint's generation_config.json: every field obeyed, known not to matter, or refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import NoneType
from typing import Any

from infer.sampling import Sampling
from qwen_jax.errors import InputError

# What transformers takes where a checkpoint samples and does not say it.
TOP_K = 50
# Fields that would change what is generated, at the values that change nothing. transformers' names.
_OFF: dict[str, tuple[Any, ...]] = {
    "constraints": (None,),
    "diversity_penalty": (0,),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (None,),
    "factual_nucleus_sampling": (False,),
    "force_words_ids": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (1,),
    "max_time": (None,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "remove_invalid_values": (False,),
    "sequence_bias": (None,),
    "token_healing": (False,),
    "top_h": (None,),
    "typical_p": (1,),
    "watermarking_config": (None,),
}
# Fields about files, speed, reports or beams, which do not change a sequence that is sampled by itself.
_WITHOUT_EFFECT = frozenset(
    """
    transformers_version bos_token_id pad_token_id decoder_start_token_id
    use_cache cache_implementation cache_config max_cache_len compile_config disable_compile low_memory
    continuous_batching_config prefill_chunk_size use_mtp
    output_attentions output_hidden_states output_logits output_scores return_dict_in_generate renormalize_logits
    early_stopping length_penalty max_window_size
    decay_bound decay_factor max_context_size max_generate_size
    is_assistant num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold
    assistant_early_exit assistant_ensemble_weight assistant_lookbehind target_lookbehind speculation_type
    prompt_lookup_num_tokens max_matching_ngram_size
    """.split()
)
# Fields of `Sampling`, under the same names but one.
_SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size", "min_length"),
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids"),
)
_OTHERS = (
    *("do_sample", "eos_token_id", "stop_strings", "stop_words_ids"),
    *("min_new_tokens", "max_new_tokens", "max_length", "chat_format"),
)


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """What a checkpoint says about how it is sampled and where its answers end; the defaults say nothing."""

    sampling: Sampling = Sampling()
    eos_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    stop_words_ids: tuple[tuple[int, ...], ...] = ()
    """Qwen1's: an answer ends where it ends with one of these."""
    max_tokens: int | None = None
    max_length: int | None = None
    """Of prompt and answer, where `max_tokens` does not say it."""
    chat_format: str | None = None
    """Qwen1's: "chatml" or "raw"."""

    @classmethod
    def parse(cls, fields: Any) -> GenerationConfig:
        """Of the file's JSON object; null is no field. Raises InputError naming a field that cannot be obeyed."""
        if not isinstance(fields, Mapping):
            raise InputError(f"generation_config.json must hold one object, not a {type(fields).__name__}.")
        given = {name: value for name, value in fields.items() if value is not None}
        for name, value in given.items():
            if name in _OFF and value not in _OFF[name]:
                raise InputError(
                    f"generation_config.json sets {name} to {value!r:.80}, which is not done; remove it to do without."
                )
            if name not in (*_OFF, *_WITHOUT_EFFECT, *_SAMPLING, *_OTHERS) and not name.startswith("_"):
                raise InputError(
                    f"generation_config.json has the unknown field {name!r}; remove it if it may be passed over."
                )
        settings = {name: _setting(name, given[name]) for name in _SAMPLING if name in given}
        samples = _checked("do_sample", given.get("do_sample", False), bool)
        settings = {"temperature": 1.0, "top_k": TOP_K if samples else 0} | settings
        settings["min_tokens"] = _limit("min_new_tokens", given.get("min_new_tokens", 0), least=0)
        try:
            sampling = Sampling(**settings)
        except InputError as error:
            raise InputError(f"generation_config.json: {error}") from None
        if not samples:
            sampling = dataclasses.replace(sampling, temperature=0.0)
        eos = tuple(_checked("eos_token_id", id, int) for id in _listed(given.get("eos_token_id")))
        # as in transformers, an end of text is no bad word
        words = tuple(word for word in sampling.bad_words_ids if word not in {(id,) for id in eos})
        return cls(
            dataclasses.replace(sampling, bad_words_ids=words),
            eos_token_ids=eos,
            stop_words_ids=_words("stop_words_ids", given.get("stop_words_ids", [])),
            stop=tuple(_checked("stop_strings", text, str) for text in _listed(given.get("stop_strings"))),
            max_tokens=_limit("max_new_tokens", given.get("max_new_tokens")),
            max_length=_limit("max_length", given.get("max_length")),
            chat_format=_checked("chat_format", given.get("chat_format"), str, NoneType),
        )


def _checked(name: str, value: Any, *types: type) -> Any:
    good = isinstance(value, types) and (bool in types or not isinstance(value, bool))
    if not good or (isinstance(value, int) and not -(2**31) <= value < 2**31):
        expected = " or ".join(kind.__name__ for kind in types if kind is not NoneType)
        raise InputError(
            f"generation_config.json: {name}={value!r:.80} is not possible; it must be of type {expected}."
        )
    return value


def _limit(name: str, value: Any, *, least: int = 1) -> int | None:
    if _checked(name, value, int, NoneType) is not None and value < least:
        raise InputError(f"generation_config.json: {name}={value!r:.80} is not possible; it must be at least {least}.")
    return value


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _setting(name: str, value: Any) -> Any:
    """A value of JSON as `Sampling` has it."""
    default = getattr(Sampling, name)
    if isinstance(default, tuple):
        return _words(name, value) if name == "bad_words_ids" else _ids(name, value)
    if isinstance(default, float):
        return float(_checked(name, value, int, float))
    return _checked(name, value, int)


def _ids(name: str, value: Any) -> tuple[int, ...]:
    return tuple(_checked(name, id, int) for id in _checked(name, value, list))


def _words(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    words = tuple(_ids(name, word) for word in _checked(name, value, list))
    if () in words:
        raise InputError(f"generation_config.json: {name} has an empty word; remove it.")
    return words
