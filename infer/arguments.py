"""Options that several commands share."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from qwen_jax.errors import InputError
from qwen_jax.local_path import local_path

if TYPE_CHECKING:
    from infer.qwen import Qwen
    from infer.sampling import Sampling
    from infer.stream import Timing


@dataclasses.dataclass(frozen=True)
class ModelArguments:
    """Which model runs, and how exactly."""

    model: str = "default"
    """`default` (Qwen2.5-Coder-0.5B-Instruct), a local folder, a .gguf file, or a Hugging Face id."""
    dtype: Literal["bfloat16", "float16", "float32", "int8"] = "bfloat16"
    """Of weights and activations; int8 rounds activations in products, on CPUs and TPUs (docs/quantisation.md)."""
    cache_dtype: Literal["int8"] | None = None
    """Of keys and values that are kept; by default that of the activations."""
    mesh: str | None = None
    """Split the model over all devices, for example `tensor=4`; default the first device alone."""
    dequantise: bool | None = None
    """Widen quantised weights to `dtype`, which takes more memory; by default those of GGUF files alone."""
    adapter: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A PEFT folder whose adapter is added, or NAME=FOLDER; with several, `generate` answers with each and `chat`
    changes from one to another."""

    def load(self) -> Qwen:
        """The model with its only adapter, if any. Raises InputError where there are several."""
        if len(self.adapter) > 1:
            raise InputError("this command takes one --adapter; generate and chat take several.")
        return self.load_each()[0][1]

    def load_each(self) -> list[tuple[str, Qwen]]:
        """The model with each adapter, and the adapter's name; without any, the model alone."""
        from infer.qwen import load

        named = [_named(adapter) for adapter in self.adapter]
        if twice := [name for name, count in Counter(name for name, _ in named).items() if count > 1]:
            raise InputError(f"two adapters are called {twice[0]}; name them apart, as NAME=FOLDER.")
        alone = named[0][1] if len(named) == 1 else None
        options = {"cache_dtype": self.cache_dtype, "dequantise": self.dequantise, "adapter": alone}
        qwen = load(self.model, dtype=self.dtype, mesh=self.mesh, progress=sys.stderr.isatty(), **options)
        if len(named) < 2:
            return [(named[0][0] if named else "", qwen)]
        return [(name, qwen.with_adapter(folder)) for name, folder in named]


@dataclasses.dataclass(frozen=True)
class SamplingArguments:
    """How tokens are chosen. What is not given comes from the checkpoint's generation_config.json."""

    max_tokens: int | None = None
    """Tokens an answer may have; 512 where the checkpoint does not say."""
    temperature: float | None = None
    """0 takes the likeliest token, without penalties unless given."""
    top_k: int | None = None
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float | None = None
    """Keep the likeliest tokens that together reach this probability."""
    min_p: float | None = None
    """Drop tokens less likely than this fraction of the likeliest."""
    repetition_penalty: float | None = None
    """Above 1 makes tokens of the prompt and the answer less likely."""
    presence_penalty: float | None = None
    """Subtracted from the logits of tokens already in the answer."""
    seed: int = 0
    """The same seed and prompt give the same answer."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A text that ends the answer and is not part of it; may be repeated."""

    def _given(self) -> dict[str, Any]:
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "seed")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def check(self) -> None:
        """Raises InputError for an impossible value, before a model is loaded for it."""
        from infer.sampling import Sampling

        Sampling(**self._given())

    def sampling(self, qwen: Qwen) -> Sampling:
        return qwen.sampling(**self._given())


def _named(adapter: str) -> tuple[str, str]:
    """Name and folder of NAME=FOLDER, or of a folder alone, whose name is its own."""
    name, equals, folder = adapter.partition("=")
    if equals and not local_path(adapter).exists():
        return name, folder
    return local_path(adapter).name, adapter


def peak_memory_gib() -> float:
    """Peak memory of the accelerator, or, on CPU, of the process."""
    import resource

    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def closing_line(timing: Timing) -> str:
    """Tokens, rates, time to first token and memory of one generation, for people."""
    return (
        f"{timing.prompt_tokens} prompt + {timing.answer_tokens} answer tokens | "
        f"prefill {timing.prefill_rate:.1f} tok/s | decode {timing.decode_rate:.1f} tok/s | "
        f"first token {timing.prefill_seconds:.2f} s | peak memory {peak_memory_gib():.2f} GiB"
    )
