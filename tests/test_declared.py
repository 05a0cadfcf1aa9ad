"""Tokens, names and templates that a folder's files declare, against what `transformers` makes of the same folder."""

import json

import pytest

from qwen_jax.errors import InputError
from qwen_jax.tokenizer import load_tokenizer
from tests.infer import tiny

TEXT = "a<tok_new>b<|im_end|>\n<extra> <eos2><|endoftext|>x<other>"
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
NEW = 263  # the tiny tokenizer ends with 262


def token(text, special=True, **flags):
    return {"content": text, "special": special, **FLAGS, **flags}


OWN = {"260": token("<|endoftext|>"), "261": token("<|im_start|>"), "262": token("<|im_end|>")}
# name -> tokenizer_config.json's changes, other files
FOLDERS = {
    "nothing": ({}, {}),
    "added_tokens_decoder": ({"added_tokens_decoder": OWN | {"263": token("<tok_new>")}}, {}),
    "not special": ({"added_tokens_decoder": OWN | {"263": token("<tok_new>", special=False)}}, {}),
    "flags": ({"added_tokens_decoder": OWN | {"263": token("<tok_new>", lstrip=True, rstrip=True)}}, {}),
    "extra": ({"extra_special_tokens": ["<tok_new>", "<extra>"]}, {}),
    "additional": ({"additional_special_tokens": ["<tok_new>", "<|im_end|>"]}, {}),
    "additional beside decoder": (
        {
            "added_tokens_decoder": OWN | {"263": token("<tok_new>")},
            "additional_special_tokens": ["<extra>", "<tok_new>"],
        },
        {},
    ),
    "named": ({"eos_token": "<eos2>", "bos_token": "<tok_new>", "unk_token": None}, {}),
    "named object": ({"eos_token": {"__type": "AddedToken", **token("<eos2>")}}, {}),
    "added_tokens.json": ({}, {"added_tokens.json": {"<other>": 264, "<tok_new>": 263}}),
    "added and named": ({"pad_token": "<other>"}, {"added_tokens.json": {"<other>": 264, "<tok_new>": 263}}),
    "decoder hides the older files": (
        {"added_tokens_decoder": OWN},
        {"added_tokens.json": {"<tok_new>": 263}, "special_tokens_map.json": {"eos_token": "<eos2>"}},
    ),
    "special_tokens_map": ({}, {"special_tokens_map.json": {"eos_token": "<eos2>", "pad_token": token("<tok_new>")}}),
    "split_special_tokens": ({"split_special_tokens": True}, {}),
    "a word of the vocabulary": ({"pad_token": "the"}, {}),
}


def write(folder, changes, files):
    tiny.tokenizer().save(folder)
    plain = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    for name, content in {"tokenizer_config.json": plain | changes, **files}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_tokens_are_those_of_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = write(tmp_path, *FOLDERS[name])
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert ours.encode(TEXT) == theirs(TEXT, add_special_tokens=False)["input_ids"]
    assert ours.named_tokens == theirs.special_tokens_map
    assert len(ours) == len(theirs)
    assert ours.eos_ids[0] == theirs.eos_token_id and ours.pad_id == theirs.pad_token_id
    ids = list(range(250, len(ours)))
    assert ours.decode(ids, skip_special=True) == theirs.decode(ids, skip_special_tokens=True)


JINJA = "{{ 'from a file' }}"
NAMED = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]


@pytest.mark.parametrize(
    ("in_config", "files"),
    [
        ("plain", {}),
        (NAMED, {}),
        (NAMED[:1], {}),
        ("plain", {"chat_template.jinja": JINJA}),
        (NAMED, {"chat_template.jinja": JINJA}),
        ("plain", {"chat_template.jinja": JINJA, "additional_chat_templates/tool_use.jinja": "t"}),
        ("plain", {"additional_chat_templates/rag.jinja": "r"}),
        (None, {}),
    ],
)
def test_templates_are_those_of_transformers(in_config, files, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = write(tmp_path, {"chat_template": in_config}, files)
    theirs = transformers.AutoTokenizer.from_pretrained(folder).chat_template
    ours = load_tokenizer(folder).chat_template
    assert ours == (theirs["default"] if isinstance(theirs, dict) and [*theirs] == ["default"] else theirs)


@pytest.mark.parametrize(
    ("changes", "files", "message"),
    [
        ({"added_tokens_decoder": []}, {}, "in an unknown way"),
        ({"added_tokens_decoder": {"x": token("<a>")}}, {}, "in an unknown way"),
        ({"added_tokens_decoder": {"263": 3}}, {}, "in an unknown way"),
        ({"added_tokens_decoder": {"300": token("<a>")}}, {}, "'<a>' is declared with id 300, but is 263"),
        ({"eos_token": 3}, {}, "in an unknown way"),
        ({"eos_token": {"text": "x"}}, {}, "in an unknown way"),
        ({"extra_special_tokens": 3}, {}, "in an unknown way"),
        ({"tokenizer_class": 3}, {}, "in an unknown way"),
        ({"chat_template": 3}, {}, "a chat template must be text"),
        ({"chat_template": [3]}, {}, "in an unknown way"),
        ({}, {"added_tokens.json": "[1]"}, "must be a mapping"),
        ({}, {"added_tokens.json": "[" * 100_000}, "is nested too deeply"),
        ({}, {"generation_config.json": {"eos_token_id": "258"}}, "eos_token_id='258' is not possible"),
        ({}, {"generation_config.json": {"eos_token_id": [258, None]}}, "eos_token_id=[258, None] is not possible"),
    ],
)
def test_what_cannot_be_taken_is_one_sentence(changes, files, message, tmp_path):
    with pytest.raises(InputError) as error:
        load_tokenizer(write(tmp_path, changes, files))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_tokenizer_without_endoftext_has_its_own_end(tmp_path):
    """As DeepSeek's distillations of Qwen, which renamed it."""
    folder = write(tmp_path, {"eos_token": "<end>", "pad_token": "<end>", "tokenizer_class": "LlamaTokenizerFast"}, {})
    file = folder / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace("<|endoftext|>", "<end>"), encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_ids == (260,) and tokenizer.end_of_text_id == tokenizer.pad_id == 260
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match="declare no eos_token"):
        load_tokenizer(folder)
