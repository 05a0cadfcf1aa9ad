"""Several adapters over one loaded model: each answers as if it were merged, and the weights are not copied."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer import chat, generate
from infer.qwen import Qwen, load
from infer.stream import Answer
from qwen_jax.backend import Backend
from qwen_jax.errors import InputError
from qwen_jax.kernels import native
from qwen_jax.model import Inputs, forward, init, unembed
from qwen_jax.weights import convert
from qwen_jax.weights.export import save_hf
from qwen_jax.weights.load import ParamsCheckpoint, load_params
from qwen_jax.weights.names import leaves
from qwen_jax.weights.open import open_checkpoint
from qwen_jax.weights.peft import LowRank, MergedCheckpoint, apply_adapter, read_adapter, save_adapter
from tests.infer import tiny

CONFIG = dataclasses.replace(tiny.CONFIG, hidden_size=64, head_dim=16, intermediate_size=96, initializer_range=0.1)
MODULES = {"first": ("q_proj", "down_proj", "gate_proj"), "second": ("v_proj", "o_proj", "up_proj")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The model, and beside it the adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    params = init(CONFIG, jax.random.key(0))
    tiny.save_folder(folder / "model", CONFIG, params)
    for number, (name, modules) in enumerate(MODULES.items()):
        rng = np.random.default_rng(number)
        adapter = {}
        for leaf in leaves(CONFIG, "hf"):
            if leaf.tensor.removesuffix(".weight").rpartition(".")[2] in modules and len(leaf.unit) > leaf.row_axes:
                front = leaf.shape[: len(leaf.shape) - len(leaf.unit)]
                a = rng.standard_normal((*front, 4, *leaf.unit[leaf.row_axes :])).astype(np.float32)
                b = rng.standard_normal((*front, *leaf.unit[: leaf.row_axes], 4)).astype(np.float32)
                adapter[leaf.path] = LowRank(a, 0.1 * b, None, 0.5)
        save_adapter(adapter, CONFIG, folder / name, base="model")
    return folder


def merged(folder: Path, name: str, dtype: str) -> Qwen:
    checkpoint = open_checkpoint(folder / "model")
    checkpoint = MergedCheckpoint(checkpoint, read_adapter(folder / name, CONFIG))
    return Qwen(CONFIG, load_params(checkpoint, dtype, progress=False), tiny.tokenizer())


def close(found: list[Answer], wanted: list[Answer], limit: float) -> None:
    """The log-probabilities of the likeliest tokens after each prompt."""
    for x, y in zip(found, wanted, strict=True):
        first, second = dict(x.top_logprobs[0]), dict(y.top_logprobs[0])
        common = first.keys() & second.keys()
        assert len(common) >= 12 and max(abs(first[id] - second[id]) for id in common) <= limit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_answers_as_if_merged(folder: Path, dtype: str) -> None:
    qwen = load(folder / "model", dtype=dtype, progress=False)
    prompts = ["the inner thing", "there", "when in the"]
    alone = qwen.generate(prompts, qwen.sampling(temperature=0.0), max_tokens=24)
    for name in MODULES:
        other, alike = qwen.with_adapter(folder / name), merged(folder, name, dtype)
        options = {"sampling": other.sampling(temperature=0.0), "max_tokens": 24, "top_logprobs": 20}
        found, wanted = other.generate(prompts, **options), alike.generate(prompts, **options)
        assert [x.tokens for x in found] != [x.tokens for x in alone]
        if dtype == "float32":
            assert [x.tokens for x in found] == [x.tokens for x in wanted]
        # a merged sum is rounded to bfloat16, an adapter beside its base is not
        close(found, wanted, 1e-4 if dtype == "float32" else 0.3)
        ours, theirs = (set(map(id, jax.tree.leaves(model.params))) for model in (qwen, other))
        assert ours <= theirs
    again = qwen.generate(prompts, qwen.sampling(temperature=0.0), max_tokens=24)
    assert [x.tokens for x in again] == [x.tokens for x in alone]


def test_over_native_kernels(folder: Path) -> None:
    if reason := native.why_not():
        pytest.skip(reason)
    qwen = load(folder / "model", dtype="int8", progress=False)
    assert qwen.backend == dataclasses.replace(Backend.of(None), native=True)
    prompts = ["the inner thing", "there"]
    other = qwen.with_adapter(folder / "first")
    options = {"sampling": other.sampling(temperature=0.0), "max_tokens": 1, "top_logprobs": 20}
    found, without = other.generate(prompts, **options), qwen.generate(prompts, **options)
    close(found, merged(folder, "first", "float32").generate(prompts, **options), 0.3)  # activations are rounded
    with pytest.raises(AssertionError):
        close(without, found, 0.3)


def test_generate_answers_with_each(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["there", "--model", str(folder / "model"), "--dtype", "float32", "--max-tokens", "6", "--temperature", "0"]
    adapters = ["--adapter", str(folder / "first"), "--adapter", f"other={folder / 'second'}"]
    assert generate.main([*argv, *adapters, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["adapter"] for row in rows] == ["first", "other"] and rows[0]["text"] != rows[1]["text"]
    assert generate.main([*argv, *adapters]) == 0
    lines = capsys.readouterr().out
    assert lines.index("=== first") < lines.index("=== other")
    assert generate.main([*argv, "--adapter", f"one={folder / 'first'}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == rows[0]["text"]


def test_chat_changes_adapters(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    qwen = load(folder / "model", dtype="float32", progress=False)
    models = {name: qwen.with_adapter(folder / name) for name in MODULES}
    conversation = chat.Conversation(models, generate.SamplingArguments(), None)
    assert conversation.line("/adapter") and "* first\n  second" in capsys.readouterr().out
    assert conversation.line("/adapter second") and conversation.qwen is models["second"]
    assert conversation.line("/adapter third") and "there are: first, second." in capsys.readouterr().out
    assert conversation.qwen is models["second"]


@pytest.mark.parametrize("base", ["as it was trained", "before it was quantised"])
def test_merging_says_what_it_changed(base: str, folder: Path, tmp_path: Path, capsys: Any) -> None:
    """An adapter trained over a quantised model and merged into that or into what it was made of."""
    params = load_params(open_checkpoint(folder / "model"), np.float32, progress=False)
    rounded = jax.tree.map(lambda x: x, params)
    mlp = rounded["layers"]["mlp"]
    mlp["up"]["kernel"] = jnp.round(8 * mlp["up"]["kernel"]) / 8
    save_hf(ParamsCheckpoint(rounded, CONFIG, open_checkpoint(folder / "model")), tmp_path / "few", progress=False)
    adapter = read_adapter(folder / "first", CONFIG)
    save_adapter(adapter, CONFIG, tmp_path / "adapter", base=str(tmp_path / "few"))
    source = tmp_path / "few" if base == "as it was trained" else folder / "model"
    options = ["--to", "hf", "--dtype", "bfloat16", "--adapter", str(tmp_path / "adapter")]
    assert convert.main([str(source), str(tmp_path / "out"), *options]) == 0
    said = capsys.readouterr().out
    numbers = re.search(r"over (\S+) in float32: at most (\S+) and in the mean (\S+) apart, where .* is (\S+);", said)
    assert numbers is not None and numbers[1] == str(tmp_path / "few"), said
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, 128), np.int32))

    def logits(params: Any) -> np.ndarray:
        return np.asarray(unembed(CONFIG, params, forward(CONFIG, params, Inputs.inference(tokens)).hidden))

    trained = logits(apply_adapter(rounded, adapter))
    written = logits(load_params(open_checkpoint(tmp_path / "out"), np.float32, progress=False))
    apart = np.abs(written - trained)
    found = [float(number) for number in numbers.groups()[1:]]
    np.testing.assert_allclose(found, [apart.max(), apart.mean(), np.abs(trained).max()], rtol=0.05)
    assert (apart.max() > 0.2 * np.abs(trained).max()) == (base == "before it was quantised")


def test_what_names_cannot_be(folder: Path) -> None:
    arguments = generate.Arguments(model=str(folder / "model"), adapter=(str(folder / "first"), f"first={folder}"))
    with pytest.raises(InputError, match="two adapters are called first"):
        arguments.load_each()
    with pytest.raises(InputError, match="takes one --adapter"):
        arguments.load()
    with pytest.raises(InputError, match="nowhere"):
        load(folder / "model", progress=False).with_adapter(folder / "nowhere")
