"""Perplexity against sums over whole-sequence logits, needles by what their prompts hold, and the command."""

import dataclasses
import functools
import gzip
import json
import math
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer import evaluate_needle, evaluate_perplexity, evaluate_sparse
from infer.evaluate import main
from infer.evaluate_needle import Haystack
from infer.evaluate_schemes import trained_length, with_scheme
from infer.qwen import Qwen
from infer.stream import Answer
from qwen_jax.config import DualChunk, DynamicNtkScaling, LinearScaling, ModelConfig, NtkScaling, YarnScaling
from qwen_jax.errors import InputError
from qwen_jax.model import Inputs, forward, init, unembed
from tests.infer import tiny

# --- schemes ----------------------------------------------------------------------------------------------------------

NOTHING = {"rope_scaling": None, "logn_trained_length": None, "windows": (), "dual_chunk": None}


@pytest.mark.parametrize(
    ("scheme", "changes"),
    [
        ("none", {}),
        ("linear:2", {"rope_scaling": LinearScaling(2.0)}),
        ("ntk:3", {"rope_scaling": NtkScaling(3.0)}),
        ("yarn:4", {"rope_scaling": YarnScaling(4.0, tiny.TRAINED)}),
        ("ntk", {"rope_scaling": DynamicNtkScaling(tiny.TRAINED)}),
        (
            "ntk+logn+window:8-20",
            {
                "rope_scaling": DynamicNtkScaling(tiny.TRAINED),
                "logn_trained_length": tiny.TRAINED,
                "windows": (8, 20),
            },
        ),
        ("dca:24,8", {"dual_chunk": DualChunk(24, 8, tiny.TRAINED)}),
    ],
)
def test_schemes(scheme, changes):
    """In place of Qwen1's own, which are dynamic NTK and LogN from 32 tokens on."""
    assert trained_length(tiny.QWEN1_CONFIG) == tiny.TRAINED
    assert with_scheme(tiny.QWEN1_CONFIG, scheme) == dataclasses.replace(tiny.QWEN1_CONFIG, **(NOTHING | changes))


def test_own_scheme_and_trained_length():
    assert with_scheme(tiny.QWEN1_CONFIG, "own") is tiny.QWEN1_CONFIG
    assert with_scheme(tiny.CONFIG, "yarn:4").rope_scaling == YarnScaling(4.0, 512)
    assert with_scheme(tiny.CONFIG, "yarn:4", trained=64).rope_scaling == YarnScaling(4.0, 64)
    windows = with_scheme(dataclasses.replace(tiny.CONFIG, num_layers=4), "window:100-400").windows
    assert windows == (100, 200, 300, 400)


@pytest.mark.parametrize(
    "scheme", ["", "yarn", "yarn:0.5", "yarn:x", "ntk:0", "logn:3", "dca:8", "dca:8,8", "window:9"]
)
def test_unknown_schemes(scheme):
    with pytest.raises(InputError, match="is not a long-context scheme; expected own"):
        with_scheme(tiny.CONFIG, scheme)


def test_a_kind_of_scheme_is_given_once():
    with pytest.raises(InputError, match="sets rope_scaling twice"):
        with_scheme(tiny.CONFIG, "yarn:4+ntk")


# --- perplexity -------------------------------------------------------------------------------------------------------

IDS = np.random.default_rng(7).integers(0, 256, 400).astype(np.int32)


def brute_force(config, params, windows, scored: int, dynamic: bool) -> np.ndarray:
    """Of each window, the mean of -log p over its last `scored` tokens, from all logits of one plain pass."""
    lengths = jnp.full(len(windows), windows.shape[1]) if dynamic else None
    hidden = forward(config, params, Inputs.inference(jnp.asarray(windows), lengths=lengths)).hidden
    logprobs = np.asarray(jax.nn.log_softmax(unembed(config, params, hidden[:, :-1])))
    nll = -np.take_along_axis(logprobs, windows[:, 1:, None], axis=-1)[..., 0]
    return nll[:, -scored:].mean(axis=1)


@pytest.mark.parametrize(
    ("config", "length", "stride"),
    [(tiny.CONFIG, 100, None), (tiny.CONFIG, 90, 40), (tiny.QWEN1_CONFIG, 130, None)],
    ids=["side by side", "stride", "qwen1"],
)
def test_perplexity_is_that_of_all_logits(config, length, stride, monkeypatch):
    monkeypatch.setattr(evaluate_perplexity, "PIECE", 48)
    monkeypatch.setattr(evaluate_perplexity, "BATCH_TOKENS", 300)
    monkeypatch.setattr(evaluate_perplexity, "LOGIT_ROWS", 32)
    params = init(config, jax.random.key(1))
    read = []
    found = evaluate_perplexity.measure(config, params, IDS, length, stride=stride, advance=read.append)
    starts = range(0, len(IDS) - length + 1, stride or length)
    scored = min(stride or length, length - 1)
    windows = np.stack([IDS[i : i + length] for i in starts])
    means = brute_force(config, params, windows, scored, config.model_type == "qwen")
    assert found.nll == pytest.approx(np.mean(means), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(np.mean(means)), rel=1e-4)
    assert found.standard_error == pytest.approx(np.std(means, ddof=1) / math.sqrt(len(means)), rel=1e-3)
    assert found.tokens == len(means) * scored
    assert sum(read) == len(means) * length


# --- needles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("is_chat", [True, False])
def test_needle_prompts(params, depth, is_chat):
    model = Qwen(tiny.CONFIG, params, tiny.tokenizer())
    if not is_chat:
        model.tokenizer.eos_ids = model.tokenizer.encode("<|endoftext|>")
    assert model.is_chat_model == is_chat
    text = "".join(f"This is sentence {i}. " for i in range(40))
    trial = Haystack(model, text).trial(700, depth, seed=1)
    prompt = model.tokenizer.decode(trial.prompt)
    longest = max(len(model.tokenizer.encode(f"This is sentence {i}. ")) for i in range(40))
    assert 700 - longest < len(trial.prompt) <= 700
    needle = f" is {trial.number}. "
    assert prompt.count(needle) == 1
    before, after = (part.count("sentence") for part in prompt.split(needle))
    assert before / (before + after) == pytest.approx(depth, abs=0.03)
    name = next(name for name in evaluate_needle.NAMES if name in prompt)
    if is_chat:
        assert prompt.endswith("<|im_start|>assistant\n")
        assert f"What is the special magic number of {name}?" in prompt.rpartition("sentence")[2]
    else:
        assert prompt.endswith(f"The special magic number of {name} is")


def test_needles_differ_by_seed_alone(qwen):
    haystack = Haystack(qwen)
    first, again, other = (haystack.trial(500, 0.5, seed) for seed in (0, 0, 1))
    assert first == again != other


def test_scores(qwen, monkeypatch):
    trials = [Haystack(qwen).trial(500, 0.5, seed) for seed in range(2)]
    answers = [Answer(500, text=f"It is {trials[0].number}!"), Answer(500, text="none")]
    monkeypatch.setattr(Qwen, "generate", lambda self, prompts, sampling, max_tokens: answers)
    assert evaluate_needle.scores(qwen, trials) == [True, False]


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(params, tmp_path_factory):
    return tiny.save_folder(tmp_path_factory.mktemp("evaluate") / "model", tiny.CONFIG, params)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt.gz"
    words = random.Random(0).choices(["the", "winter", "er", "in", "a"], k=600)
    path.write_bytes(gzip.compress(" ".join(words).encode()))
    return path


def run(capsys, *args) -> str:
    assert main([str(arg) for arg in args]) == 0
    return capsys.readouterr().out


def test_perplexity_command(folder, text, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "new" / "perplexity.png"
    common = ("perplexity", "--model", folder, "--dtype", "float32", "--text", text, "--lengths", 64, 128)
    out = run(capsys, *common, "--rope", "own", "yarn:4", "dca:48,16", "--trained", 64, "--plot", plot)
    assert [line.split()[0] for line in out.splitlines()[1:5]] == ["rope", "own", "yarn:4", "dca:48,16"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    rows = json.loads(run(capsys, *common, "--json"))
    assert [(row["rope"], row["length"]) for row in rows] == [("own", 64), ("own", 128)]
    assert f"{rows[0]['perplexity']:.3f}" == out.splitlines()[2].split()[1]
    assert rows[0]["tokens"] / 63 * 64 == rows[1]["tokens"] / 127 * 128  # the same text at every length


def test_needle_command(folder, tmp_path, capsys, monkeypatch):
    """A model that sees 250 tokens back finds what is hidden at the end of a prompt, and in a short prompt all."""
    pytest.importorskip("matplotlib")
    generate = Qwen.generate

    def short_sighted(self, prompts, *args, **kwargs):
        texts = [self.tokenizer.decode(ids[-250:]) for ids in prompts]
        found = [number[1] if (number := re.search(r" is (\d{5})\. ", text)) else "no number" for text in texts]
        answers = generate(self, prompts, *args, **kwargs)
        return [dataclasses.replace(answer, text=text) for answer, text in zip(answers, found, strict=True)]

    monkeypatch.setattr(Qwen, "generate", short_sighted)
    plot = tmp_path / "needle.png"
    common = ("needle", "--model", folder, "--lengths", 256, 600, "--depths", 0, 1)  # 600: beyond the 512 of its config
    out = run(capsys, *common, "--rope", "none", "dca:512,64", "--plot", plot)
    assert plot.read_bytes().startswith(b"\x89PNG")
    tables = [table.splitlines() for table in out.split("Needles found, ")[1:]]
    assert [table[0].split(",")[0] for table in tables] == ["none", "dca:512"]
    for table in tables:
        assert [line.split() for line in table if "%" in line] == [["0%", "100%", "0%"], ["100%", "100%", "100%"]]
    rows = json.loads(run(capsys, *common, "--json"))
    assert [(row["length"], row["depth"], row["score"]) for row in rows] == [
        (256, 0.0, 1.0),
        (256, 1.0, 1.0),
        (600, 0.0, 0.0),
        (600, 1.0, 1.0),
    ]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["perplexity"], "needs a text"),
        (["perplexity", "--text", "nowhere.txt"], "nowhere.txt is not a readable UTF-8 text"),
        (["perplexity", "--text", "TEXT", "--lengths", "1"], "--lengths must be at least 2"),
        (["perplexity", "--text", "TEXT", "--lengths", "64", "--stride", "65"], "--stride between 1 and the shortest"),
        (["perplexity", "--text", "TEXT", "--lengths", "100000"], "but the longest window is 100000"),
        (["perplexity", "--text", "TEXT", "--lengths", "64", "--rope", "yaarn:4"], "'yaarn:4' in 'yaarn:4' is not"),
        (["needle", "--lengths", "64"], "no room for the needle; use at least"),
        (["needle", "--depths", "2"], "--depths between 0 and 1"),
        (["needle", "--trials", "0"], "--trials must be at least 1"),
        (["needle", "--lengths"], "--lengths is empty"),
    ],
)
def test_what_cannot_be_evaluated(folder, text, args, said):
    args = [str(text) if arg == "TEXT" else arg for arg in args]
    with pytest.raises(InputError, match=said):
        main([*args, "--model", str(folder)])


# --- sparse prefill ---------------------------------------------------------------------------------------------------


def test_sparse_search(qwen, folder, text, tmp_path, capsys):
    """Budgets grow until every head keeps enough, and with budgets for everything the recall is 1."""
    search = functools.partial(evaluate_sparse.search, qwen.config, qwen.params, IDS, columns=30, diagonals=50)
    rounds = search(recall=0.97, step=60, rounds=4)
    recalls = np.stack([one.recall for one in rounds])
    assert (recalls[0] < 0.97).any() and (recalls[-1] >= 0.97).all()
    assert (np.diff(recalls, axis=0) >= -1e-4).all()  # more budget, more attention
    for before, after in zip(rounds, rounds[1:], strict=False):
        np.testing.assert_array_equal(after.vertical - before.vertical, 60 * (before.recall < 0.97))
        np.testing.assert_array_equal(after.slash - before.slash, 60 * (before.recall < 0.97))
    np.testing.assert_allclose(search(recall=0.9, step=1, rounds=1, columns=400)[0].recall, 1, atol=1e-5)

    output = tmp_path / "new" / "sparse_attention_config.json"
    common = ("sparse", "--model", folder, "--dtype", "float32", "--text", text, "--tokens", 400, "--step", 400)
    rows = json.loads(run(capsys, *common, "--json", "--rope", "dca:160,40", "--recall", 0.999, "--output", output))
    assert rows[-1]["heads below"] == 0 and rows[-1]["lowest recall"] >= 0.999
    declared = {"chunk_size": 160, "local_size": 40, "sparse_attention_config": json.loads(output.read_text())}
    config = ModelConfig.from_hf(tiny.CONFIG.to_hf() | {"dual_chunk_attention_config": declared})
    assert config.sparse_prefill and len(config.sparse_prefill.vertical) == 2
