"""generation_config.json: what transformers does with a field is done, or the field is refused by name."""

import dataclasses
import json

import jax
import pytest

from infer.generation_config import _OFF, GenerationConfig
from infer.qwen import Qwen
from infer.sampling import Sampling
from qwen_jax.errors import InputError
from qwen_jax.model import init
from tests.infer import tiny

CONFIG = dataclasses.replace(tiny.CONFIG, vocab_size=263)
PROMPT = [5, 6, 7, 5, 6]
STEPS = 10


@pytest.fixture(scope="module")
def params():
    return init(CONFIG, jax.random.key(4))


@pytest.fixture(scope="module")
def model(params):
    return Qwen(CONFIG, params, tiny.tokenizer())


@pytest.fixture(scope="module")
def theirs(params, tmp_path_factory):
    """transformers' greedy tokens under a generation config."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tiny.save_folder(tmp_path_factory.mktemp("hf") / "model", CONFIG, params)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def generate(fields):
        model.generation_config = transformers.GenerationConfig(**fields)
        ids = torch.tensor([PROMPT])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), tokenizer=tokenizer)
        return out[0, len(PROMPT) :].tolist()

    return generate


@pytest.fixture(scope="module")
def plain(theirs):
    return theirs({"max_new_tokens": STEPS, "eos_token_id": 262, "pad_token_id": 0})


def obeyed(plain):
    """Fields whose effect depends on what the model says by itself."""
    return {
        "nothing": {},
        "eos_token_id": {"eos_token_id": plain[3]},
        "several ends": {"eos_token_id": [262, plain[4], plain[2]]},
        "max_length": {"max_new_tokens": None, "max_length": len(PROMPT) + 4},
        "max_new_tokens first": {"max_new_tokens": 3, "max_length": 400},
        "suppress_tokens": {"suppress_tokens": [plain[0], plain[2], 9999]},
        "begin_suppress_tokens": {"begin_suppress_tokens": [plain[0]]},
        "bad words": {"bad_words_ids": [[plain[1]], [plain[2], plain[3]]]},
        "an end is no bad word": {"bad_words_ids": [[plain[3]]], "eos_token_id": plain[3]},
        "long bad word": {"bad_words_ids": [[*PROMPT[-2:], *plain[:2]], [1] * 50]},
        "min_new_tokens": {"min_new_tokens": 6, "eos_token_id": plain[2]},
        "min_length": {"min_length": len(PROMPT) + 5, "eos_token_id": plain[2]},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
        "no_repeat_ngram_size 2": {"no_repeat_ngram_size": 2},
        "repetition_penalty": {"repetition_penalty": 1.7},
        "nulls": {"temperature": None, "top_k": None, "do_sample": None, "suppress_tokens": None, "stop_strings": None},
        "without effect": {"use_cache": False, "num_beams": 1, "typical_p": 1.0, "length_penalty": 2.0},
        "unused": {"do_sample": False, "temperature": 0.5, "top_p": 0.9, "top_k": 3},
    }


@pytest.mark.parametrize("name", obeyed([0] * STEPS))
def test_fields_are_obeyed_as_by_transformers(model, theirs, plain, name):
    fields = {"max_new_tokens": STEPS, "eos_token_id": 262, "pad_token_id": 0} | obeyed(plain)[name]
    model.generation_config = fields
    model.__dict__.pop("turns", None)
    [answer] = model.generate([PROMPT])
    assert answer.tokens == theirs(fields)


def test_stop_strings(model):
    for stop in ("e", ["zz", "e"]):
        answer_of = tiny.scripted("ABCthe")
        answer_of.generation_config = {"stop_strings": stop, "max_new_tokens": 9}
        assert answer_of.generate("?")[0].text == "ABCth"


def test_qwen1_stop_words():
    """As QwenLM's own logits processor: an answer ends where its tokens end with those of a word."""
    for word, said in (("C", "AB"), ("Cth", "AB"), ("BA", "ABCthe")):
        model = tiny.scripted("ABCthe")
        word_ids = model.tokenizer.encode(word)
        model.generation_config = {"stop_words_ids": [[262], word_ids], "max_new_tokens": 9}
        answer = model.generate("?")[0]
        assert answer.text == said and answer.finish_reason == "stop"


def test_the_first_release_of_qwen_opens():
    first = {"chat_format": "chatml", "decay_bound": 0.0, "decay_factor": 1.0, "factual_nucleus_sampling": False}
    first |= {"eos_token_id": 151643, "pad_token_id": 151643, "max_context_size": 1024, "max_generate_size": 512}
    first |= {"max_new_tokens": 512, "stop_words_ids": [[151643]], "do_sample": True, "top_k": 0, "top_p": 0.8}
    found = GenerationConfig.parse(first)
    assert found.stop_words_ids == ((151643,),) and found.sampling.top_p == 0.8 and found.max_tokens == 512
    with pytest.raises(InputError, match="factual_nucleus_sampling"):
        GenerationConfig.parse(first | {"factual_nucleus_sampling": True})


def test_sampling_fields_and_their_defaults():
    parsed = GenerationConfig.parse({"do_sample": True, "temperature": 0.7, "top_p": 0.8, "min_p": 0.1})
    assert parsed.sampling == Sampling(temperature=0.7, top_p=0.8, min_p=0.1, top_k=50)  # transformers' own top_k
    assert GenerationConfig.parse({"do_sample": True, "top_k": 0}).sampling == Sampling(temperature=1.0)
    assert GenerationConfig.parse({}).sampling == Sampling()


def test_changes_of_the_caller(model):
    model.generation_config = {"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.1, "suppress_tokens": [1]}
    assert model.sampling(temperature=0.0, seed=3) == Sampling(top_k=50, seed=3, suppress_tokens=(1,))
    assert model.sampling(top_k=4) == Sampling(0.7, top_k=4, repetition_penalty=1.1, suppress_tokens=(1,))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 4},
        {"typical_p": 0.9},
        {"guidance_scale": 1.5},
        {"forced_eos_token_id": 3},
        {"sequence_bias": [[[1], 2.0]]},
        {"watermarking_config": {}},
        {"temprature": 0.5},
        {"temperature": "0.7"},
        {"do_sample": "yes"},
        {"do_sample": True, "temperature": float("nan")},
        {"top_p": float("inf")},
        {"top_k": 2**40},
        {"top_k": [20]},
        {"max_new_tokens": 1.5},
        {"max_new_tokens": 2**60},
        {"max_new_tokens": 0},
        {"max_length": True},
        {"temperature": 10**400},
        {"min_new_tokens": -1},
        {"eos_token_id": "258"},
        {"eos_token_id": [258, None]},
        {"eos_token_id": True},
        {"eos_token_id": 10**30},
        {"stop_strings": [3]},
        {"suppress_tokens": 3},
        {"bad_words_ids": [[]]},
        {"bad_words_ids": {"a": 1}},
        {"chat_format": 3},
    ],
)
def test_what_cannot_be_obeyed_is_refused_by_name(params, fields):
    with pytest.raises(InputError, match=[*fields][-1]) as error:
        Qwen(CONFIG, params, tiny.tokenizer(), json.loads(json.dumps(fields)))
    assert "generation_config.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("file", [[], "text", 3, None])
def test_a_file_that_holds_no_object(file):
    if file is not None:
        with pytest.raises(InputError, match="must hold one object"):
            GenerationConfig.parse(file)


def test_every_field_of_transformers_is_known():
    transformers = pytest.importorskip("transformers")
    defaults = transformers.GenerationConfig._get_default_generation_params()
    GenerationConfig.parse(
        transformers.GenerationConfig().to_dict() | {k: v for k, v in defaults.items() if k != "max_length"}
    )
    for name in vars(transformers.GenerationConfig()):
        GenerationConfig.parse({name: _OFF[name][0]} if name in _OFF else {name: None})
