"""Fill-in-the-middle and repositories as Qwen2.5-Coder has them."""

from __future__ import annotations

import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.chat import default_template, render
from qwen_jax.errors import InputError
from tests.train.data_tools import byte_tokenizer
from train.data.config import DataConfig, SourceConfig
from train.data.documents import FIM_TOKENS, Tokenise, mean_tokens
from train.data.loader import make_loader
from train.data.records import Repository
from train.data.sources import open_source

TOKENIZER = byte_tokenizer()
PREFIX, SUFFIX, MIDDLE = (TOKENIZER.special_tokens[name] for name in FIM_TOKENS)
END = TOKENIZER.special_tokens["<|endoftext|>"]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
REPOSITORY = Repository("org/name", (("a.py", "import b\n"), ("b.py", "x = 1")))


def tokens_of(document, fim_rate=0.0, max_tokens=10**6, seed=0, tokenizer=TOKENIZER):
    tokenise = Tokenise(tokenizer, fim_rate=fim_rate, max_tokens=max_tokens)
    tokens = tokenise.random_map(document, np.random.default_rng(seed))["tokens"]
    assert tokens.dtype == np.int32
    return tokens.tolist()


def put_back(tokens):
    """The text of prefix, suffix, middle, in reading order."""
    assert tokens[0] == PREFIX and tokens[-1] == END
    suffix, middle = tokens.index(SUFFIX), tokens.index(MIDDLE)
    parts = tokens[1:suffix], tokens[middle + 1 : -1], tokens[suffix + 1 : middle]
    return "".join(TOKENIZER.decode(part) for part in parts)


@settings(max_examples=300, deadline=None)
@given(text=ANY_TEXT, seed=st.integers(0, 1000))
def test_fill_in_the_middle_holds_the_whole_text(text, seed):
    tokens = tokens_of(text, fim_rate=1.0, seed=seed)
    assert put_back(tokens) == unicodedata.normalize("NFC", text)
    assert [tokens.count(id) for id in (PREFIX, SUFFIX, MIDDLE, END)] == [1, 1, 1, 1]
    assert tokens.index(PREFIX) < tokens.index(SUFFIX) < tokens.index(MIDDLE)


def test_a_cut_does_not_part_a_character_from_its_accent():
    text = "e\u0301" * 10  # ten characters once composed
    for seed in range(50):
        tokens = tokens_of(text, fim_rate=1.0, seed=seed)
        assert put_back(tokens) == "é" * 10 and len(tokens) == 24


def test_both_cuts_are_uniform():
    text = "".join(chr(ord("a") + i) for i in range(9))
    cuts = np.zeros(10)
    for seed in range(4000):
        tokens = tokens_of(text, fim_rate=1.0, seed=seed)
        cuts[tokens.index(SUFFIX) - 1] += 1
        cuts[9 - (tokens.index(MIDDLE) - tokens.index(SUFFIX) - 1)] += 1
    np.testing.assert_allclose(cuts, 800, atol=5 * np.sqrt(800))


def test_the_rate_is_a_share_of_documents():
    rewritten = sum(tokens_of("some text", fim_rate=0.3, seed=seed)[0] == PREFIX for seed in range(4000))
    assert abs(rewritten - 1200) < 5 * np.sqrt(4000 * 0.3 * 0.7)
    assert not any(tokens_of("some text", fim_rate=0.0, seed=seed)[0] == PREFIX for seed in range(50))


def test_a_document_that_would_be_cut_stays_in_order():
    text = "x" * 20
    assert tokens_of(text, fim_rate=1.0, max_tokens=24)[0] == PREFIX  # 20, three tokens and the end
    assert tokens_of(text, fim_rate=1.0, max_tokens=23) == tokens_of(text)


def test_spelled_out_special_tokens_are_text():
    text = "".join(FIM_TOKENS) + "<|endoftext|>"
    assert tokens_of(text).count(END) == 1
    assert put_back(tokens_of(text, fim_rate=1.0)) == text


def test_repository_as_the_coder_s_readme_writes_it(default_gguf):
    from qwen_jax.tokenizer import load_tokenizer

    expected = "<|repo_name|>org/name\n<|file_sep|>a.py\nimport b\n\n<|file_sep|>b.py\nx = 1<|endoftext|>"
    assert TOKENIZER.decode(tokens_of(REPOSITORY)) == expected
    qwen = load_tokenizer(default_gguf)
    tokens = tokens_of(REPOSITORY, tokenizer=qwen)
    assert qwen.decode(tokens) == expected
    assert [id for id in tokens if id in qwen.special_ids] == [151663, 151664, 151664, 151643]
    middle = tokens_of(REPOSITORY, fim_rate=1.0, tokenizer=qwen)
    assert [id for id in middle if id in qwen.special_ids] == [151663, 151664, 151664, 151659, 151661, 151660, 151643]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000))
def test_fill_in_the_middle_of_a_repository_s_last_file(seed):
    tokens = tokens_of(REPOSITORY, fim_rate=1.0, seed=seed)
    start = tokens.index(PREFIX)
    assert TOKENIZER.decode(tokens[:start]) == "<|repo_name|>org/name\n<|file_sep|>a.py\nimport b\n\n<|file_sep|>b.py\n"
    assert put_back(tokens[start:]) == "x = 1"


def test_mean_tokens():
    documents = ["é" * n for n in range(101)]  # two bytes, so two tokens, each
    tokenise = Tokenise(TOKENIZER, fim_rate=0.0, max_tokens=10**6)
    exact = np.mean([len(tokens_of(document)) for document in documents])
    assert abs(mean_tokens(documents, tokenise) / exact - 1) < 0.02
    assert abs(mean_tokens(documents, tokenise, documents=20, tokenised=5) / exact - 1) < 0.1


def test_of_a_conversation_only_the_assistant_is_learned(tmp_path):
    special = ["endoftext", "im_start", "im_end"]
    tokenizer = byte_tokenizer(special)
    tokenizer.chat_template = default_template("qwen2.5")
    messages = [
        {"role": "user", "content": "two<|im_end|>?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "no, 三"},
    ]
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([{"talk": messages}, {"talk": "none"}]), encoding="utf-8")
    with pytest.raises(InputError, match="chat.json, element 2 is no conversation"):
        open_source(SourceConfig(str(path), messages_field="talk"))
    path.write_text(json.dumps([{"talk": messages}]), encoding="utf-8")
    source = SourceConfig(str(path), messages_field="talk")
    config = DataConfig((source,), sequence_length=512, batch_size=1, packing="concat", epochs=1)
    with make_loader(config, tokenizer) as loader:
        (batch,) = loader
    ids = tokenizer.encode(render(messages, template=tokenizer.chat_template, add_generation_prompt=False))
    row = batch["tokens"][0][batch["segment_ids"][0] > 0]
    assert row.tolist() == ids
    learned = batch["targets"][0][batch["loss_mask"][0] > 0]
    assert tokenizer.decode(learned.tolist()) == "yes<|im_end|>no, 三<|im_end|>"
