"""An engine's answers are those of `Qwen.generate`, however requests come, share pages, give way or leave."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer.engine import Engine
from infer.engine.drafts import Drafts
from infer.qwen import Qwen
from infer.sampling import Sampling
from qwen_jax.config import DualChunk, ModelConfig, MoeConfig
from qwen_jax.errors import InputError
from qwen_jax.model import init
from tests.infer import tiny

CONFIGS = {
    "plain": tiny.CONFIG,
    "window": dataclasses.replace(tiny.CONFIG, windows=(40, None)),
    "dual chunk": dataclasses.replace(tiny.CONFIG, dual_chunk=DualChunk(40, 8, 64)),
    "qwen1": tiny.QWEN1_CONFIG,
    "mixture": dataclasses.replace(tiny.CONFIG, model_type="qwen2_moe", moe=MoeConfig(4, 2, 16, 24)),
}
SMALL = {"page": 16, "piece": 32, "steps": 4}
WORDS = "the rain in there when the other thing is inner".split()


def model(config: ModelConfig) -> Qwen:
    return Qwen(config, init(config, jax.random.key(0)), tiny.tokenizer())


def prompts(count: int) -> list[str]:
    rng = np.random.default_rng(count)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 20))) for _ in range(count)]


@pytest.fixture(scope="module")
def qwen() -> Qwen:
    return model(tiny.CONFIG)


# others compile all of it again
@pytest.mark.parametrize(
    "name", ["plain", *(pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS if name != "plain")]
)
def test_answers_are_those_of_generate(name: str) -> None:
    """More requests than rows, greedy and drawn with seeds, of prompts longer than a piece."""
    qwen = model(CONFIGS[name])
    texts = prompts(5)
    samplings = [Sampling(), Sampling(temperature=0.8, seed=7, top_k=30), Sampling(repetition_penalty=1.3)]
    samplings = [samplings[i % 3] for i in range(len(texts))]
    wanted = qwen.generate(texts, samplings, max_tokens=20, top_logprobs=3)
    engine = Engine(qwen, rows=2, **SMALL)
    found = engine.generate(texts, samplings, max_tokens=20, top_logprobs=3)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.tokens, ours.text, ours.finish_reason) == (theirs.tokens, theirs.text, theirs.finish_reason)
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-4)
        assert [[id for id, _ in top] for top in ours.top_logprobs] == [
            [id for id, _ in top] for top in theirs.top_logprobs
        ]
    engine.pool.check()
    assert engine.is_idle and engine.pool.available == engine.pool.num_pages - 1


def test_a_prompt_that_begins_like_another_is_read_from_where_they_differ(qwen: Qwen) -> None:
    engine = Engine(qwen, **SMALL)
    system = "the rain in there is the other thing in the inner rain " * 3
    wanted = qwen.generate([system + "when", system + "where"], qwen.sampling(temperature=0.0), max_tokens=12)
    requests = []
    for end in ("when", "where", "when"):
        requests.append(engine.add(system + end, qwen.sampling(temperature=0.0), max_tokens=12))
        while not requests[-1].is_over:
            engine.step()
    count = len(qwen.tokenizer.encode(system)) // 16 * 16
    assert [request.cached for request in requests] == [0, count, count]
    assert [request.answer.tokens for request in requests] == [wanted[i].tokens for i in (0, 1, 0)]


@pytest.mark.slow
def test_what_depends_on_the_prompts_length_is_not_shared() -> None:
    """Qwen1 turns keys by the length of the whole prompt."""
    qwen = model(tiny.QWEN1_CONFIG)
    engine = Engine(qwen, **SMALL)
    system = "the rain in there is the other thing in the inner rain " * 3
    wanted = [qwen.generate(system + end, qwen.sampling(temperature=0.0), max_tokens=8)[0] for end in ("a", "a there")]
    for end, answer in zip(("a", "a there"), wanted, strict=True):
        assert engine.generate(system + end, qwen.sampling(temperature=0.0), max_tokens=8)[0].tokens == answer.tokens


def test_with_too_few_pages_the_youngest_gives_way(qwen: Qwen, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is read of pages that were given back: they are made NaN."""
    texts, sampling = prompts(4), [Sampling(), Sampling(temperature=1.0, seed=3), Sampling(), Sampling()]
    wanted = qwen.generate(texts, sampling, max_tokens=60)
    longest = max(len(qwen.tokenizer.encode(text)) for text in texts) + 60
    engine = Engine(qwen, rows=4, num_pages=2 + -(-longest // 16), **SMALL)
    gave_way, leave = [], engine._leave

    def leaves(request) -> None:
        pages = [page for page in request.pages if engine.pool._holders[page] == 1]
        if not request.is_over:
            gave_way.append(request)
        leave(request)
        lost = jnp.array([page for page in pages if page not in engine.pool._key_of], int)
        engine._layers = jax.tree.map(lambda x: x.at[:, lost].set(jnp.nan), engine._layers)

    monkeypatch.setattr(engine, "_leave", leaves)
    found = engine.generate(texts, sampling, max_tokens=60)
    assert [answer.tokens for answer in found] == [answer.tokens for answer in wanted]
    assert gave_way
    engine.pool.check()
    assert engine.pool.available == engine.pool.num_pages - 1
    assert engine.pool.available == engine.pool.num_pages - 1


def test_requests_join_and_leave_a_running_batch(qwen: Qwen) -> None:
    engine = Engine(qwen, rows=2, **SMALL)
    texts = prompts(4)
    wanted = qwen.generate(texts, qwen.sampling(temperature=0.0), max_tokens=30)
    first, cancelled = (engine.add(text, qwen.sampling(temperature=0.0), max_tokens=30) for text in texts[:2])
    said = {first: "", cancelled: ""}
    for _ in range(4):
        for request, text in engine.step():
            said[request] += text
    engine.cancel(cancelled)
    later = [engine.add(text, qwen.sampling(temperature=0.0), max_tokens=30) for text in texts[2:]]
    said |= dict.fromkeys(later, "")
    while not engine.is_idle:
        for request, text in engine.step():
            said[request] += text
    assert cancelled.answer.finish_reason is None and len(cancelled.answer.tokens) < 30
    for request, answer in zip((first, *later), (wanted[0], *wanted[2:]), strict=True):
        assert said[request] == request.answer.text == answer.text
    assert engine.pool.available == engine.pool.num_pages - 1


def test_ends_are_each_requests_own(qwen: Qwen) -> None:
    engine = Engine(qwen, **SMALL)
    greedy = qwen.sampling(temperature=0.0)
    whole = engine.generate("there", greedy, max_tokens=12)[0]
    stop = whole.tokens[4]
    short = engine.add("there", greedy, max_tokens=12, stop_ids=[stop])
    long = engine.add("there", greedy, max_tokens=12)
    patient = engine.add("there", dataclasses.replace(greedy, min_tokens=12), max_tokens=12, stop_ids=[stop])
    while not engine.is_idle:
        engine.step()
    assert short.answer.tokens == whole.tokens[: whole.tokens.index(stop) + 1] and short.answer.finish_reason == "stop"
    assert long.answer.tokens == whole.tokens and stop not in patient.answer.tokens[:11]


def test_int8_pages_are_near(qwen: Qwen) -> None:
    greedy = {"sampling": qwen.sampling(temperature=0.0), "max_tokens": 1, "top_logprobs": 5}
    texts = prompts(3)
    wanted = qwen.generate(texts, **greedy)
    found = Engine(qwen, cache_dtype="int8", **SMALL).generate(texts, **greedy)
    for ours, theirs in zip(found, wanted, strict=True):
        first, second = dict(ours.top_logprobs[0]), dict(theirs.top_logprobs[0])
        assert max(abs(first[id] - second[id]) for id in first.keys() & second.keys()) < 0.2


def test_what_cannot_be(qwen: Qwen) -> None:
    with pytest.raises(InputError, match="piece=40 must be a multiple of page=16"):
        Engine(qwen, page=16, piece=40)
    with pytest.raises(InputError, match="steps=33 is not possible; it must be between 1 and 32"):
        Engine(qwen, steps=33)  # more than the decode program has room for
    with pytest.raises(InputError, match="num_pages=1 leaves no page"):
        Engine(qwen, num_pages=1)
    engine = Engine(qwen, num_pages=3, **SMALL)
    with pytest.raises(InputError, match="need more than the engine's 2 pages of 16"):
        engine.add("there", max_tokens=100)
    with pytest.raises(InputError, match="a prompt is empty"):
        engine.add("")
    assert engine.is_idle


@pytest.mark.parametrize(
    "name", ["plain", *(pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS if name != "plain")]
)
def test_drafts_change_no_answer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that repeat themselves, greedy and drawn, with penalties and limits in the middle of a draft."""
    monkeypatch.setattr(Drafts, "learn", lambda *_: None)  # also wrong ones, again and again
    qwen = model(CONFIGS[name])
    again = "the rain in there when the other thing is inner " * 3
    few = {"allowed_tokens": tuple(qwen.tokenizer.encode("qxz"))}  # so that the same comes again soon
    samplings = [
        Sampling(**few),
        Sampling(temperature=1.0, seed=3, **few),
        Sampling(repetition_penalty=1.3, frequency_penalty=0.05, **few),
        Sampling(),
    ]
    engine = Engine(qwen, rows=4, **SMALL)
    for limit in (40, 7):
        wanted = qwen.generate([again] * 4, samplings, max_tokens=limit, top_logprobs=2)
        found = engine.generate([again] * 4, samplings, max_tokens=limit, top_logprobs=2)
        for ours, theirs in zip(found, wanted, strict=True):
            assert (ours.tokens, ours.text, ours.finish_reason) == (theirs.tokens, theirs.text, theirs.finish_reason)
            np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-4)
    assert engine.counts.drafted_tokens > engine.counts.accepted_tokens > 10
    engine.pool.check()


def test_what_drafts_find() -> None:
    drafts = Drafts()
    assert drafts.after([1, 2, 3]) == []
    assert drafts.after([1, 2, 3, 4, 5, 1, 2, 3]) == [4, 5, 1, 2, 3, 4, 5, 1]
    drafts.learn(0)
    assert drafts.after([1, 2, 3, 4, 5, 1, 2, 3, 4, 9, 1, 2, 3]) == [4, 9, 1, 2, 3, 4, 9, 1]  # the last time counts
    drafts.learn(0)  # and what does not come true is left alone for a while
    tokens = [1, 2, 3, 4, 9, 1, 2, 3]
    assert drafts.after(tokens * 3) == [] and drafts.after(tokens * 8) != []
