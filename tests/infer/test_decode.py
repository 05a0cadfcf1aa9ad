"""Generation against a full forward pass recomputed for every token, against transformers, and against a script."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer.decode import bucket, decode, half_bucket, prefill, widen
from infer.qwen import Qwen
from infer.sampling import Sampling
from infer.stream import Answer
from qwen_jax.errors import InputError
from qwen_jax.model import Inputs, forward, init, unembed
from tests.infer import tiny

GREEDY = Sampling()
WIDTH = 160  # of every recomputed forward pass
rng = np.random.default_rng(0)
PROMPTS = [rng.integers(0, 256, n).tolist() for n in (5, 31, 47)]


@functools.partial(jax.jit, static_argnames=("config", "dynamic"))
def _all_logits(config, params, tokens, lengths, dynamic):
    inputs = Inputs.inference(tokens, lengths=lengths) if dynamic else Inputs.training(tokens)
    hidden = forward(config, params, inputs).hidden
    return jax.nn.log_softmax(unembed(config, params, hidden)[..., : len(tiny.tokenizer())])


def recomputed(model: Qwen, prompt: list[int], answer: Answer, *, trained_length: int | None = None) -> np.ndarray:
    """Log-probabilities [n, tokens of the tokenizer] at each token of the answer, from one pass without any cache.

    In it a position sees only those before it, so it is the same as one pass per token. `trained_length`: the length
    that Qwen1's dynamic NTK shall look at.
    """
    sequence = prompt + answer.tokens
    tokens = np.zeros((1, WIDTH), np.int32)
    tokens[0, : len(sequence)] = sequence
    length = np.array([trained_length or len(prompt)], np.int32)
    logprobs = np.asarray(_all_logits(model.config, model.params, tokens, length, trained_length is not None))[0]
    return logprobs[len(prompt) - 1 : len(sequence) - 1]


def assert_greedy(model: Qwen, prompt: list[int], answer: Answer, **kwargs) -> None:
    expected = recomputed(model, prompt, answer, **kwargs)
    assert answer.tokens == expected.argmax(-1).tolist()
    np.testing.assert_allclose(answer.logprobs, expected.max(-1), atol=2e-4)


# --- the cache and the batch ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(qwen):
    """Each prompt's greedy answer, decoded by itself."""
    return [qwen.generate([prompt], GREEDY, max_tokens=40)[0] for prompt in PROMPTS]


def test_greedy_is_the_argmax_of_the_whole_sequence(qwen, alone):
    for prompt, answer in zip(PROMPTS, alone, strict=True):
        assert_greedy(qwen, prompt, answer)
        assert (len(answer.tokens), answer.finish_reason) == (40, "length")
        assert len(set(answer.tokens)) > 5, "a model that repeats itself tests little"


def test_ragged_batch_is_each_row_alone(qwen, alone):
    """Three rows, so that the fourth is a filler."""
    for answer, expected in zip(qwen.generate(PROMPTS, GREEDY, max_tokens=40), alone, strict=True):
        assert answer.tokens == expected.tokens
        np.testing.assert_allclose(answer.logprobs, expected.logprobs, atol=2e-4)


@pytest.mark.parametrize("length", [48, 49])
def test_prompts_at_the_edge_of_a_bucket(qwen, length):
    prompt = np.random.default_rng(length).integers(0, 256, length).tolist()
    assert_greedy(qwen, prompt, qwen.generate([prompt], GREEDY, max_tokens=10)[0])


def test_to_the_end_of_the_context(params):
    model = Qwen(dataclasses.replace(tiny.CONFIG, max_position_embeddings=64), params, tiny.tokenizer())
    answer = model.generate([PROMPTS[2]], GREEDY, max_tokens=1000)[0]
    assert len(answer.tokens) == 64 - 47
    assert answer.finish_reason == "length"
    assert_greedy(model, PROMPTS[2], answer)


def test_filler_rows_of_a_backend_change_nothing(qwen, params, alone):
    model = Qwen(tiny.CONFIG, params, tiny.tokenizer())
    model.backend = dataclasses.replace(model.backend, min_decode_rows=4)
    assert model.generate(PROMPTS[:1], GREEDY, max_tokens=40)[0].tokens == alone[0].tokens
    drawn = Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.2, seed=3)
    a, b = (m.generate(PROMPTS[:1], drawn, max_tokens=20)[0] for m in (model, qwen))
    assert a.tokens == b.tokens


def test_filler_rows_are_finished_and_possible(qwen):
    """A penalty of 0 would make NaN of their logits, and one such row sends every step to the slow full sort."""
    stream = qwen.stream(PROMPTS[:1], Sampling(temperature=1.0, repetition_penalty=1.2))
    state = widen(stream._prefill()[0], 4)
    assert state.done.tolist() == [False, True, True, True]
    assert (state.rows.repetition_penalty == state.rows.repetition_penalty[0]).all()


@pytest.mark.parametrize(
    ("size", "whole", "half"), [(1, 1, 32), (33, 64, 48), (48, 64, 48), (49, 64, 64), (65, 128, 96)]
)
def test_buckets(size, whole, half):
    assert (bucket(size), half_bucket(size, 32)) == (whole, half)


def test_qwen1_keeps_its_prompts_alpha():
    """Trained on 32: a prompt of 47 has alpha 3 also once the answer passes 64; one of 31 alpha 1 also beyond 32."""
    model = Qwen(tiny.QWEN1_CONFIG, init(tiny.QWEN1_CONFIG, jax.random.key(0)), tiny.tokenizer())
    answers = model.generate(PROMPTS, GREEDY, max_tokens=40)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert_greedy(model, prompt, answer, trained_length=len(prompt))
    # the test can tell: with the alpha of the whole sequence something else comes out
    other = recomputed(model, PROMPTS[2], answers[2], trained_length=47 + 40)
    assert np.abs(other.max(-1) - answers[2].logprobs).max() > 0.01


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_is_transformers_generate(qwen, params, tmp_path_factory, penalty):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tiny.save_folder(tmp_path_factory.mktemp("hf") / "model", tiny.CONFIG, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    banned = list(range(len(tiny.tokenizer()), tiny.VOCAB_ROWS))  # the padding rows
    prompt = PROMPTS[1]
    out = theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=24,
        repetition_penalty=penalty,
        suppress_tokens=banned,
        eos_token_id=None,
        pad_token_id=0,
    )
    answer = qwen.generate([prompt], Sampling(repetition_penalty=penalty), max_tokens=24)[0]
    assert answer.tokens == out[0, len(prompt) :].tolist()


def test_requests_share_programs(qwen):
    """What a request asks for is data: neither stop ids nor reports nor sampling compile anything anew."""

    def programs():
        return prefill._cache_size(), decode._cache_size()

    qwen.generate("ab", GREEDY, max_tokens=3)
    before = programs()
    for arguments in (
        {"stop_ids": [5]},
        {"stop_ids": [5, 6, 7]},
        {"top_logprobs": 1},
        {"top_logprobs": 20},
        {"stop": "x"},
        {"sampling": Sampling(temperature=1.0, top_p=0.9)},
        {"sampling": Sampling(repetition_penalty=1.1, min_tokens=1, suppress_tokens=(3,))},
    ):
        answer = qwen.generate("ab", **{"sampling": GREEDY, "max_tokens": 3} | arguments)[0]
        assert len(answer.tokens) == 3
        assert len(answer.top_logprobs) == (3 if "top_logprobs" in arguments else 0)
        assert {len(top) for top in answer.top_logprobs} <= {arguments.get("top_logprobs")}
    assert programs() == before


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(params, bad):
    changed = jax.tree.map(lambda x: x, params)
    changed["lm_head"]["embedding"] = changed["lm_head"]["embedding"].at[7, :].set(bad)
    model = Qwen(tiny.CONFIG, changed, tiny.tokenizer())
    for sampling in (GREEDY, Sampling(temperature=1.0)):
        with pytest.raises(InputError, match="logits are not finite at token 1 of an answer"):
            model.generate([PROMPTS[0]], sampling, max_tokens=4)


# --- log-probabilities and padding rows -------------------------------------------------------------------------------


def test_logprobs_are_of_the_models_own_distribution(qwen):
    drawn = Sampling(temperature=1.5, top_k=50, repetition_penalty=1.2, presence_penalty=0.5, seed=1)
    for sampling in (GREEDY, drawn):
        answer = qwen.generate([PROMPTS[0]], sampling, max_tokens=20, top_logprobs=3)[0]
        expected = recomputed(qwen, PROMPTS[0], answer)
        np.testing.assert_allclose(answer.logprobs, expected[np.arange(20), answer.tokens], atol=2e-4)
        for top, row in zip(answer.top_logprobs, expected, strict=True):
            assert [token for token, _ in top] == np.argsort(-row)[:3].tolist()
            np.testing.assert_allclose([logprob for _, logprob in top], np.sort(row)[::-1][:3], atol=2e-4)


def test_padding_rows_are_never_produced(params):
    head, tokens = params["lm_head"]["embedding"], len(tiny.tokenizer())
    changed = params | {"lm_head": {"embedding": head.at[tokens:].set(1000 * head[tokens:])}}
    model = Qwen(tiny.CONFIG, changed, tiny.tokenizer())
    hidden = forward(tiny.CONFIG, model.params, Inputs.inference(jnp.array(PROMPTS[1])[None])).hidden
    assert (jnp.argmax(unembed(tiny.CONFIG, model.params, hidden), -1) >= tokens).all()
    hot = [Sampling(temperature=3e38, seed=seed) for seed in range(3)]  # the lowest float would be likely
    for samplings in ([GREEDY] * 3, hot):
        stream = model.stream(PROMPTS, samplings, max_tokens=32, top_logprobs=3)
        for _ in stream:
            pass
        produced = [token for answer in stream.answers for token in answer.tokens]
        produced += [token for answer in stream.answers for top in answer.top_logprobs for token, _ in top]
        assert max(produced) < tokens
        assert np.isfinite([x for answer in stream.answers for x in answer.logprobs]).all()


# --- seeds ------------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_answer_in_any_batch(qwen):
    def draw(seeds, prompts):
        stream = qwen.stream(prompts, [Sampling(temperature=1.0, seed=seed) for seed in seeds], max_tokens=20)
        for _ in stream:
            pass
        return [answer.tokens for answer in stream.answers]

    first = draw([1, 2, 3], PROMPTS)
    assert draw([3, 2, 1], PROMPTS[::-1]) == first[::-1]
    assert draw([2], PROMPTS[1:2]) == first[1:2]
    same_prompt = draw([1, 2, 1], [PROMPTS[0]] * 3)
    assert same_prompt[0] == same_prompt[2] == first[0] != same_prompt[1]


def test_samples_of_one_prompt_differ_and_other_prompts_keep_the_seed(qwen):
    hot = Sampling(temperature=1.0, seed=2**32 - 1)
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]]
    answers = [tuple(answer.tokens) for answer in qwen.generate(prompts, hot, max_tokens=12)]
    assert len({*answers}) == 4
    alone = [qwen.generate([prompt], hot, max_tokens=12)[0].tokens for prompt in PROMPTS[:2]]
    assert [list(answers[0]), list(answers[1])] == alone
    again = qwen.generate([PROMPTS[0]], dataclasses.replace(hot, seed=0), max_tokens=12)[0].tokens
    assert list(answers[2]) == again, "the next seed"


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_one_prompt_needs_no_list(qwen):
    ids = qwen.tokenizer.encode("hello")
    expected = [answer.tokens for answer in qwen.generate(["hello"], GREEDY, max_tokens=3)]
    for prompts in (
        "hello",
        ids,
        np.array(ids),
        jnp.array(ids),
        np.array([ids]),
        [np.array(ids, np.int64)],
        tuple(ids),
    ):
        assert [answer.tokens for answer in qwen.generate(prompts, GREEDY, max_tokens=3)] == expected


def test_a_stream_is_iterated_once(scripted):
    stream = scripted.stream("?", GREEDY, steps=2)
    first = [piece for _, piece in zip(range(3), stream, strict=False)]
    rest = [piece for _, piece in stream]
    assert "".join(piece for _, piece in first) + "".join(rest) == SCRIPT == stream.answers[0].text
    assert [*stream] == []


# --- where answers end, and their text --------------------------------------------------------------------------------

SCRIPT = "the-wor\nld:_世界+é~in ABCDEFGHIJKxyz"  # no token twice; 世, 界 and é take several


@pytest.fixture(scope="module")
def scripted():
    return tiny.scripted(SCRIPT)


def run(model, **kwargs):
    stream = model.stream(["?"], GREEDY, **kwargs)
    pieces = [piece for _, piece in stream]
    assert "".join(pieces) == stream.answers[0].text
    return pieces, stream.answers[0]


@pytest.mark.parametrize("steps", [1, 4, 32])
def test_streamed_pieces_are_the_text(scripted, steps):
    pieces, answer = run(scripted, steps=steps)
    assert answer.text == SCRIPT == scripted.generate(["?"], GREEDY)[0].text
    assert {"世", "界", "é"} < set(pieces), "a character comes once it is whole"
    assert answer.finish_reason == "stop"
    assert answer.tokens[-1] == scripted.tokenizer.special_tokens["<|im_end|>"]
    assert len(answer.tokens) == len(answer.logprobs)
    assert answer.prompt_tokens == 1


def test_text_of_random_tokens_is_the_tokenizers(qwen):
    """Bytes that are no UTF-8 included."""
    stream = qwen.stream(PROMPTS, Sampling(temperature=1.0), max_tokens=40)
    pieces = [""] * 3
    for row, piece in stream:
        pieces[row] += piece
    for text, answer in zip(pieces, stream.answers, strict=True):
        stopped = answer.finish_reason == "stop"
        ids = answer.tokens[: len(answer.tokens) - stopped]
        assert text == answer.text == qwen.tokenizer.decode(ids, skip_special=True)


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 11])
def test_max_tokens(scripted, max_tokens):
    _, answer = run(scripted, max_tokens=max_tokens)
    assert (len(answer.tokens), answer.finish_reason) == (max_tokens, "length")
    assert answer.text == scripted.tokenizer.decode(answer.tokens)


def test_an_unfinished_character_at_the_limit(scripted):
    before = len(scripted.tokenizer.encode("the-wor\nld:_"))
    _, answer = run(scripted, max_tokens=before + 1)
    assert answer.text == "the-wor\nld:_\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (["ABC"], SCRIPT.partition("ABC")[0]),
        (["t"], ""),  # within the first token
        (["e-w"], "th"),
        (["世界"], "the-wor\nld:_"),
        (["n A"], SCRIPT.partition("n A")[0]),  # from within one token into later ones
        (["\n\n", "ABZ", "z?"], SCRIPT),  # beginnings that come to nothing, at the end of the answer too
        (["EFGX", "GH"], SCRIPT.partition("GH")[0]),  # one mark's beginning holds text back in which another appears
        (["BCDEX", "D"], SCRIPT.partition("D")[0]),
        (["xyz"], SCRIPT.removesuffix("xyz")),
    ],
)
@pytest.mark.parametrize("steps", [1, 4])
def test_stop_texts(scripted, stop, text, steps):
    """Nothing of a stop text ever reaches the reader, and nothing but a stop text is kept from him."""
    pieces, answer = run(scripted, stop=stop, steps=steps)
    assert answer.text == text
    assert answer.finish_reason == "stop"
    assert not any(mark in answer.text for mark in stop)
    # the tokens say what was computed: up to the one that completed the stop text
    assert scripted.tokenizer.decode(answer.tokens, skip_special=True).startswith(text)


def test_a_stop_text_counts_at_the_limit_too(scripted):
    limit = len(scripted.tokenizer.encode("the-wo"))
    assert run(scripted, stop=["wo"], max_tokens=limit)[1].finish_reason == "stop"
    held = run(scripted, stop=["wor"], max_tokens=limit)[1]
    assert (held.text, held.finish_reason) == ("the-wo", "length")


def test_a_stop_text_may_stand_alone(scripted):
    assert run(scripted, stop="ABC")[1].text == SCRIPT.partition("ABC")[0]


def test_stop_ids(scripted):
    token = scripted.tokenizer.encode("~")[0]
    _, answer = run(scripted, stop_ids=[token])
    assert (answer.text, answer.tokens[-1]) == (SCRIPT.partition("~")[0], token)
    declared = Qwen(scripted.config, scripted.params, scripted.tokenizer, {"eos_token_id": token})
    assert run(declared)[1].tokens == answer.tokens
    assert run(scripted, stop_ids=token)[1].tokens == answer.tokens


def test_a_closing_line_counts_every_token(scripted):
    stream = scripted.stream(["?", "A", "+"], GREEDY, stop=["H"])
    for _ in stream:
        pass
    assert stream.timing.answer_tokens == sum(len(answer.tokens) for answer in stream.answers)


def test_rows_end_apart(scripted):
    """Each row of a batch has its own end; the other rows go on."""
    stream = scripted.stream(["?", "A", "+"], GREEDY, stop=["H"])
    for _ in stream:
        pass
    texts = [SCRIPT.partition("H")[0], "BCDEFG", SCRIPT.partition("H")[0].partition("+")[2]]
    assert [answer.text for answer in stream.answers] == texts


@pytest.mark.parametrize(
    ("prompts", "kwargs", "said"),
    [
        ([], {}, "at least one prompt"),
        ([[1.5]], {}, "must be text or a list of token ids, got list"),
        ([[True]], {}, "must be text or a list of token ids, got list"),
        (["a", 3], {}, "must be text or a list of token ids, got int"),
        (["a", None], {}, "must be text or a list of token ids, got NoneType"),
        (["a"], {"top_logprobs": 21}, "top_logprobs=21"),
        (["a"], {"top_logprobs": -1}, "top_logprobs=-1"),
        ([[]], {}, "a prompt is empty"),
        ([[1] * 512], {}, "512 tokens does not fit the context of 512"),
        ([[263]], {}, "below 263"),  # the first padding row
        ([[-1]], {}, "at least 0"),
        (["a"], {"max_tokens": 0}, "max_tokens=0"),
        (["a"], {"stop": [""]}, "a stop text is empty"),
        (["a"], {"sampling": [GREEDY, GREEDY]}, "1 prompts and 2 samplings"),
    ],
)
def test_what_cannot_be_answered_is_refused(qwen, prompts, kwargs, said):
    with pytest.raises(InputError, match=said):
        qwen.stream(prompts, **kwargs)
