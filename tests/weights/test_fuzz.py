"""Small valid files, damaged at random: each opens, or is refused in one sentence, in bounded time and memory.

Damage is of bytes (flipped, cut, repeated, numbers overwritten) and of JSON's structure (other values, lost and doubled
keys). `python -m tests.weights.test_fuzz 100000` says what came of so many files.
"""

from __future__ import annotations

import base64
import collections
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from infer.qwen import Qwen
from qwen_jax import checked
from qwen_jax.chat import default_template, render
from qwen_jax.config import load_config
from qwen_jax.errors import InputError
from qwen_jax.model import init
from qwen_jax.tokenizer import load_tokenizer
from qwen_jax.weights.gguf import read_gguf
from qwen_jax.weights.open import open_checkpoint
from qwen_jax.weights.safetensors import read_safetensors
from tests.infer import tiny
from tests.test_sentencepiece import CONFIG as SENTENCEPIECE_CONFIG
from tests.test_sentencepiece import model_bytes
from tests.weights.test_gguf import state_of, write_gguf
from tests.weights.tiny import HF_CONFIGS, QWEN1_CONFIG, hf_state, write_folder

MAX_SECONDS = 5.0  # of processor time
MAX_GROWTH = 512 << 20  # bytes
SENTENCE = 2000  # characters; paths of temporary folders are long

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 10**9, 2**31, 2**63, -(2**63), 2**64, 10**30, 0.0, -0.5, 1e-6, 1e308, 0.1),
    *("", "4", "true", "yarn", "../x", "/etc/passwd", "a\nb", "\ud800", "{{", "x" * 10_000),
    *([], {}, [[]], [None], [1, 2], {"a": 1}, {"rope_type": "yarn"}, {"": {}}),
]


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, kind = rng.randrange(len(out) + 1), rng.randrange(7)
        length = rng.choice((1, 1, 2, 4, 8, 64, 1000))
        if kind == 0:
            out[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            del out[at : at + length]
        elif kind == 3:
            out[at:at] = out[at : at + length] or b"x"
        elif kind == 4:
            out[at : at + 8] = rng.choice((0, 1, 2**31, 2**63 - 1, 2**64 - 1, len(out))).to_bytes(8, "little")
        elif kind == 5:
            out[at : at + 4] = rng.choice((0, 1, 8, 9, 2**31 - 1, 2**32 - 1)).to_bytes(4, "little")
        else:
            source = rng.randrange(len(out) + 1)
            out[at : at + length] = out[source : source + length]
    return bytes(out)


def damaged_json(data: bytes, rng: random.Random) -> bytes:
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        value = _changed(value, rng)
    text = json.dumps(value, allow_nan=rng.random() < 0.5)
    if rng.random() < 0.05:
        text = text.replace(",", f",{json.dumps(rng.choice(('a', 'model_type', 'vocab_size')))}:1,", 1)
    if rng.random() < 0.02:
        text = text.replace("1", "[" * rng.choice((100, 100_000)), 1)
    if rng.random() < 0.02:
        text = text.replace("1", rng.choice(("NaN", "-Infinity", "1e999", "1" * 5000, "01")), 1)
    return text.encode()


def _changed(value: Any, rng: random.Random) -> Any:
    if not isinstance(value, dict | list) or not value or rng.random() < 0.05:
        return rng.choice(VALUES)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, copy = rng.choice(keys), value.copy()
    kind = rng.random()
    if kind < 0.15:
        del copy[key]
    elif kind < 0.25:
        copy = {**copy, str(rng.choice(VALUES))[:50]: rng.choice(VALUES)} if isinstance(copy, dict) else copy * 2
    else:
        copy[key] = _changed(value[key], rng)
    return copy


class Corpus:
    """Valid files in a folder, and what reads each of them; `files` is name -> (path, how it is damaged, reader)."""

    def __init__(self, folder: Path) -> None:
        import torch

        self.folder = folder
        config = HF_CONFIGS["qwen2"] | {"num_hidden_layers": 1}
        state = {k: v for k, v in hf_state("qwen2").items() if ".layers." not in k or ".layers.0." in k}
        self.files: dict[str, tuple[Path, Callable[[bytes, random.Random], bytes], Callable[[], object]]] = {}
        for kind, known in {**HF_CONFIGS, "qwen": QWEN1_CONFIG}.items():
            yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
            dca = {"chunk_size": 64, "local_size": 8}
            extra = {"rope_scaling": yarn} if kind in ("qwen", "qwen3") else {"dual_chunk_attention_config": dca}
            extra |= {"use_sliding_window": True, "layer_types": ["full_attention"] * 3, "quantization_config": {}}
            path = self._write(f"config_{kind}/config.json", json.dumps({**known, **extra}).encode())
            self._add(f"config {kind}", path, damaged_json, lambda path=path: load_config(path))
        whole = write_folder(folder / "whole", config, state)
        weights = whole / "model.safetensors"
        self._add("safetensors", weights, damaged_bytes, lambda: self._open(whole))
        self._add("safetensors header", weights, self._header, lambda: self._tensors(read_safetensors(weights)))
        shards = write_folder(folder / "shards", config, state)
        (shards / "model.safetensors").rename(shards / "a.safetensors")
        index = json.dumps(
            {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(state, "a.safetensors")}
        ).encode()
        path = self._write("shards/model.safetensors.index.json", index)
        self._add("index", path, damaged_json, lambda: open_checkpoint(shards))
        bins = write_folder(folder / "bin", config, state)
        (bins / "model.safetensors").unlink()
        file = bins / "pytorch_model.bin"
        torch.save({k: torch.from_numpy(v.astype(np.float32)) for k, v in state.items()}, file)
        self._add("torch .bin", file, damaged_bytes, lambda: self._open(bins))
        self._add("torch pickle", file, self._pickle, lambda: open_checkpoint(bins))
        gguf = write_gguf(folder / "x.gguf", "qwen2", state_of("qwen2"))
        self._add("GGUF", gguf, damaged_bytes, lambda: self._open(gguf))
        self._add("GGUF head", gguf, self._head, lambda: self._tensors(read_gguf(gguf)[1]))
        self._add_tokenizers()
        self._add_chats()

    def _add_tokenizers(self) -> None:
        tokenizer = tiny.tokenizer()
        tokens = self.folder / "tokenizer"
        tokenizer.save(tokens)
        path = tokens / "tokenizer_config.json"
        said = json.loads(path.read_text()) | {"eos_token": {"content": "<|im_end|>", "special": True}}
        said |= {"chat_template": [{"name": "default", "template": default_template("qwen2")}]}
        path.write_text(json.dumps(said | {"extra_special_tokens": {"image_token": "<|image|>"}}))
        self._add("tokenizer.json", tokens / "tokenizer.json", damaged_json, lambda: self._encode(tokens))
        self._add("tokenizer.json bytes", tokens / "tokenizer.json", damaged_bytes, lambda: self._encode(tokens))
        self._add("tokenizer_config.json", path, damaged_json, lambda: self._encode(tokens))
        older = self.folder / "older"
        tokenizer.save(older)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (older / name).unlink()
        self._write("older/special_tokens_map.json", json.dumps({"eos_token": "<|im_end|>"}).encode())
        self._write("older/added_tokens.json", json.dumps(tokenizer.special_tokens).encode())
        for name in ("vocab.json", "added_tokens.json", "special_tokens_map.json"):
            self._add(name, older / name, damaged_json, lambda: self._encode(older))
        self._add("merges.txt", older / "merges.txt", damaged_bytes, lambda: self._encode(older))
        pieces = self._write("pieces/tokenizer.model", model_bytes())
        self._write("pieces/tokenizer_config.json", json.dumps(SENTENCEPIECE_CONFIG).encode())
        self._add("tokenizer.model", pieces, damaged_bytes, lambda: self._encode(pieces.parent))
        ranks = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)) + b"dGg= 256\ndGhl 257\n"
        tiktoken = self._write("tiktoken/qwen.tiktoken", ranks)
        self._add("qwen.tiktoken", tiktoken, damaged_bytes, lambda: self._encode(tiktoken.parent))

    def _add_chats(self) -> None:
        params, tokenizer = init(tiny.CONFIG, jax.random.key(0)), tiny.tokenizer()
        generation = {"eos_token_id": [5, 3], "pad_token_id": 3, "do_sample": True, "temperature": 0.7, "top_k": 20}
        generation |= {"top_p": 0.8, "repetition_penalty": 1.05, "max_new_tokens": 9, "chat_format": "chatml"}
        path = self._write(
            "generation/generation_config.json", json.dumps(generation | {"stop_words_ids": []}).encode()
        )

        def sampling() -> None:
            qwen = Qwen(tiny.CONFIG, params, tokenizer, checked.read_json(path))
            assert qwen.sampling() and qwen.is_chat_model in (True, False)

        self._add("generation_config.json", path, damaged_json, sampling)
        template = self._write("template/chat_template.jinja", default_template("qwen2.5").encode())
        tokenizer.save(template.parent)
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": []}]

        def said() -> None:
            source = load_tokenizer(template.parent).chat_template
            assert source is not None
            render(messages, template=source, tools=[{"type": "function", "function": {"name": "f"}}])

        self._add("chat_template.jinja", template, damaged_bytes, said)

    @staticmethod
    def _encode(folder: Path) -> None:
        tokenizer = load_tokenizer(folder)
        tokenizer.decode(tokenizer.encode("the théin <|im_end|>\n"))

    def _write(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def _add(self, name: str, path: Path, damage: Any, read: Callable[[], object]) -> None:
        read()  # undamaged it is good
        self.files[name] = (path, damage, read)

    def _open(self, path: Path) -> None:
        checkpoint = open_checkpoint(path)
        for leaf in checkpoint.leaves:
            checkpoint.read(
                leaf.path, tuple(slice(0, 1) for _ in leaf.shape), np.empty([1] * len(leaf.shape), np.float32)
            )

    def _tensors(self, tensors: dict[str, Any]) -> None:
        for tensor in tensors.values():
            if tensor.shape and 0 not in tensor.shape:
                next(tensor.rows(0, 1))

    @staticmethod
    def _header(data: bytes, rng: random.Random) -> bytes:
        end = 8 + int.from_bytes(data[:8], "little")
        header = damaged_json(data[8:end], rng)
        return len(header).to_bytes(8, "little") + header + data[end:]

    @staticmethod
    def _head(data: bytes, rng: random.Random) -> bytes:
        return damaged_bytes(data[:4000], rng) + data[4000:]

    @staticmethod
    def _pickle(data: bytes, rng: random.Random) -> bytes:
        import io
        import zipfile

        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(out, "w") as changed:
            for record in archive.infolist():
                content = archive.read(record)
                changed.writestr(record, damaged_bytes(content, rng) if record.filename.endswith("pkl") else content)
        return out.getvalue()


def outcome(path: Path, data: bytes, read: Callable[[], object]) -> str:
    """What comes of reading `path` with `data` in it. Raises AssertionError when it is none of what may come."""
    good = path.read_bytes()
    path.write_bytes(data)
    before, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read()
        result = "opened"
    except InputError as error:
        said = str(error)
        assert len(said) < SENTENCE and said.isprintable() and said.endswith("."), f"no sentence: {said!r}"
        result = "refused"
    finally:
        path.write_bytes(good)
    assert time.process_time() - before < MAX_SECONDS, "too slow"
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024 < MAX_GROWTH, "too much memory"
    return result


def tally(folder: Path, count: int, seed: int = 0) -> tuple[dict[str, collections.Counter[str]], list[str]]:
    """Of `count` files in all: kind -> outcome -> how often; and what went wrong, with the seed that shows it again."""
    corpus = Corpus(folder)
    found: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in corpus.files}
    faults: dict[str, str] = {}
    for number in range(count):
        name = list(corpus.files)[number % len(corpus.files)]
        path, damage, read = corpus.files[name]
        data = damage(path.read_bytes(), random.Random(f"{seed} {name} {number}"))
        try:
            found[name][outcome(path, data, read)] += 1
        except BaseException as error:  # noqa: B036 - a panic of a library is none of Exception's
            if isinstance(error, KeyboardInterrupt):
                raise
            found[name]["FAULT"] += 1
            kept = folder / f"fault_{name.replace(' ', '_')}_{number}"
            kept.write_bytes(data)
            faults.setdefault(f"{name}: {type(error).__name__}: {str(error)[:200]}", str(kept))
    return found, [f"{fault} ({kept})" for fault, kept in faults.items()]


@pytest.mark.parametrize("count", [300, pytest.param(100_000, marks=pytest.mark.slow)])
def test_damaged_files_open_or_are_refused_in_a_sentence(tmp_path, count):
    found, faults = tally(tmp_path, count)
    assert not faults, "\n".join(faults)
    assert sum(map(sum, (counts.values() for counts in found.values()))) == count
    assert all(counts["refused"] for counts in found.values())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        found, faults = tally(Path(temporary), int(sys.argv[1]), int((sys.argv[2:] or [0])[0]))
        for name, counts in found.items():
            print(f"{name:24} {dict(counts)}")
        print("\n".join(faults))
