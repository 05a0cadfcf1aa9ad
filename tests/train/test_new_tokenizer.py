"""A tokenizer of one's own, and a run from random weights that needs nothing else; RoPE changes of a checkpoint."""

from __future__ import annotations

import dataclasses

import pytest

from qwen_jax.errors import InputError
from qwen_jax.tokenizer import Tokenizer
from qwen_jax.weights.open import open_checkpoint
from tests.train.data_tools import write_jsonl
from tests.train.runs import MODEL, make_run
from train.config import load_experiment
from train.data.command import main as data_command
from train.trainer import train

TEXTS = ["def the(other): return then", "the theme, there and then\n", "größe 12 东西 the"] * 5


def test_a_learned_tokenizer_is_the_same_in_transformers(tmp_path):
    import transformers

    tokenizer = Tokenizer.train(TEXTS, 300)
    assert len(tokenizer) == 300 and "<|fim_prefix|>" in tokenizer.special_tokens
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, "unseen £ text <|im_end|>"):
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text)
        assert tokenizer.decode(ids) == text


def test_merges_are_the_most_frequent_pairs():
    # of these words "an" is there 5 times and no other pair more than 3; counted by hand
    tokenizer = Tokenizer.train(["banana band an ant"], 279)
    assert tokenizer.decode([256]) == "an"


def test_what_a_vocabulary_must_hold():
    with pytest.raises(InputError, match="at least 278"):
        Tokenizer.train(TEXTS, 277)


def test_the_command_writes_a_folder_that_a_run_starts_from(tmp_path, capsys):
    text = write_jsonl(tmp_path / "text.jsonl", TEXTS)
    data_command(["tokenizer", str(text), "--out", str(tmp_path / "tokenizer"), "--vocab-size", "290"])
    assert "290 tokens" in capsys.readouterr().out
    with pytest.raises(InputError, match="already exists"):
        data_command(["tokenizer", str(text), "--out", str(tmp_path / "tokenizer")])
    experiment, _ = load_experiment(str(make_run(tmp_path)))
    config = dataclasses.replace(
        experiment,
        model=str(tmp_path / "tokenizer"),
        architecture=dataclasses.replace(MODEL, vocab_size=290),
        steps=2,
        export=tmp_path / "exported",
    )
    assert train(config) == 0
    for folder in (tmp_path / "out/final", tmp_path / "exported"):
        checkpoint = open_checkpoint(folder)
        assert checkpoint.config.vocab_size == 290
        assert checkpoint.tokenizer().encode("the") == Tokenizer.train(TEXTS, 290).encode("the")


@pytest.mark.slow
def test_a_stage_changes_the_rope_base_of_its_checkpoint(tmp_path):
    experiment, _ = load_experiment(str(make_run(tmp_path)))
    losses = {}
    for theta in (None, 5e4):
        out = tmp_path / f"out-{theta}"
        config = dataclasses.replace(experiment, steps=1, rope_theta=theta, max_position_embeddings=512, out=out)
        assert train(config) == 0
        found = open_checkpoint(out / "final").config
        assert found == dataclasses.replace(MODEL, rope_theta=theta or MODEL.rope_theta, max_position_embeddings=512)
        losses[theta] = (out / "metrics.jsonl").read_text().splitlines()[0]
    assert losses[None] != losses[5e4]
