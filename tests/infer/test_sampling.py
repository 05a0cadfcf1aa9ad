"""Penalties and truncation against transformers' processors; draws against the distribution they should follow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infer.sampling import CANDIDATES, COLDEST, NEGATIVE, Sampling, SamplingRows, ban, penalise, sample, truncate
from qwen_jax.errors import InputError

SMALL, LARGE = 50, 5000
ROWS = 4
assert SMALL < CANDIDATES < LARGE

NO_STOP = np.array([2**31 - 1], np.int32)

run_penalise, run_ban = jax.jit(penalise), jax.jit(ban)


@jax.jit
def run_sample(logits, rows, steps):
    return sample(logits, rows, steps, jnp.asarray(NO_STOP))


@jax.jit
def run_truncate(logits, rows):
    return truncate(penalise(logits, rows) / rows.temperature[:, None], rows)


def with_answers(rows: SamplingRows, answers: list[list[int]]) -> SamplingRows:
    for i in range(max(map(len, answers), default=0)):
        rows = rows.record(jnp.array([answer[min(i, len(answer) - 1)] for answer in answers]))
    return rows


def kept_by_transformers(logits: np.ndarray, seen: list[int], s: Sampling) -> np.ndarray:
    """One row's logits [V] after `generate`'s processors in its order; what they exclude is -inf."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    steps = []
    if s.repetition_penalty != 1:
        steps.append(transformers.RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    steps.append(transformers.TemperatureLogitsWarper(s.temperature))
    if s.top_k:
        steps.append(transformers.TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        steps.append(transformers.TopPLogitsWarper(s.top_p))
    if s.min_p:
        steps.append(transformers.MinPLogitsWarper(s.min_p))
    scores = torch.tensor(logits)[None]
    for step in steps:
        scores = step(torch.tensor([seen]), scores)
    return scores[0].numpy()


def assert_same_choice(ours: np.ndarray, theirs: np.ndarray, s: Sampling) -> None:
    """Equal sets and values; float32 sums of probabilities may put a token on either side of the boundary of top-p."""
    kept, expected = ours > NEGATIVE, np.isfinite(theirs)
    both = kept & expected
    np.testing.assert_allclose(ours[both], theirs[both], rtol=1e-6)
    if (differ := kept != expected).any():
        # the two sets are nested, and what one has more weighs less than the rounding of a cumulative sum
        assert both.sum() == min(kept.sum(), expected.sum())
        shifted = np.exp(
            np.where(kept | expected, ours if kept.sum() >= expected.sum() else theirs, -np.inf) - ours.max()
        )
        assert shifted[differ].sum() / shifted.sum() < 1e-5, s


sampling_strategy = st.builds(
    Sampling,
    temperature=st.floats(0.05, 5),
    top_k=st.sampled_from([0, 1, 2, 20, 1000, 1024, 1025, 2000, 4999, 9999]),
    top_p=st.sampled_from([1.0, 1e-6, 0.01, 0.3, 0.8, 0.95, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 1e-3, 0.1, 1.0]),
    repetition_penalty=st.floats(0.5, 2),
)


@pytest.mark.parametrize("vocab_size", [SMALL, LARGE])
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(samplings=st.lists(sampling_strategy, min_size=ROWS, max_size=ROWS), draw=st.integers(0, 2**32 - 1))
def test_truncation_is_transformers(vocab_size, samplings, draw):
    rng = np.random.default_rng(draw)
    logits = rng.normal(0, rng.uniform(0.1, 10), (ROWS, vocab_size)).astype(np.float32)
    prompts = rng.integers(0, vocab_size, (ROWS, 10)).tolist()
    answers = rng.integers(0, vocab_size, (ROWS, 3)).tolist()
    rows = with_answers(SamplingRows.create(samplings, prompts, vocab_size), answers)
    ours = np.asarray(run_truncate(logits, rows))
    for row, s in enumerate(samplings):
        assert_same_choice(ours[row], kept_by_transformers(logits[row], prompts[row] + answers[row], s), s)


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(0, 0.9, 0.0), (2000, 0.9, 0.0), (2000, 0.5, 0.0), (2000, 1.0, 0.0), (0, 0.999, 0.5)]
)
def test_nucleus_larger_than_the_candidates(top_k, top_p, min_p):
    """Flat distributions beside a peaked one, so that one row needs the whole vocabulary and another does not."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 0.3, (ROWS, LARGE)).astype(np.float32)
    logits[1] *= 30
    s = Sampling(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    ours = np.asarray(run_truncate(logits, SamplingRows.create([s] * ROWS, [[0]] * ROWS, LARGE)))
    if not min_p and top_p > 0.5:
        assert (ours[0] > NEGATIVE).sum() > CANDIDATES
    for row in range(ROWS):
        assert_same_choice(ours[row], kept_by_transformers(logits[row], [0], s), s)


def test_top_p_1_is_off_however_peaked():
    """Beside a certain token the others vanish in a float32 sum, but nothing excluded them."""
    logits = np.zeros((ROWS, LARGE), np.float32)
    logits[:, 0] = 40
    for top_k, kept in ((0, LARGE), (2, LARGE), (LARGE - 1, LARGE)):  # all others tie with the second
        s = Sampling(temperature=1.0, top_k=top_k)
        ours = np.asarray(run_truncate(logits, SamplingRows.create([s] * ROWS, [[0]] * ROWS, LARGE)))
        assert ((ours > NEGATIVE).sum(axis=1) == kept).all(), top_k


def test_ties_at_the_boundary_stay():
    logits = np.full((ROWS, SMALL), -9.0, np.float32)
    logits[:, :3] = [2.0, 1.0, 1.0]
    for s in (Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.7), Sampling(1.0, min_p=0.3)):
        ours = np.asarray(run_truncate(logits, SamplingRows.create([s] * ROWS, [[0]] * ROWS, SMALL)))
        assert (np.flatnonzero(ours[0] > NEGATIVE) == [0, 1, 2]).all(), s


def test_presence_and_frequency_by_their_formula():
    """mu[j] - count[j] * alpha_frequency - 1(count[j] > 0) * alpha_presence over the answer (OpenAI's definition)."""
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 3, (ROWS, SMALL)).astype(np.float32)
    prompts, answers = [[1, 2]] * ROWS, [[2, 3, 3], [4, 4, 4], [2, 5, 2], [49, 1, 2]]
    samplings = [
        Sampling(presence_penalty=p, frequency_penalty=f, repetition_penalty=r, logit_bias=((7, 3.5), (4, -100.0)))
        for p, f, r in [(0.5, 0.0, 1.0), (2.0, 0.3, 1.0), (-1.0, -0.7, 1.3), (0.0, 1.5, 2.0)]
    ]
    ours = np.asarray(run_penalise(logits, with_answers(SamplingRows.create(samplings, prompts, SMALL), answers)))
    told = SamplingRows.create(samplings, prompts, SMALL, answers=answers)
    np.testing.assert_array_equal(ours, np.asarray(run_penalise(logits, told)))
    for row, s in enumerate(samplings):
        expected = logits[row].copy()
        for token in {*prompts[row], *answers[row]}:
            expected[token] *= 1 / s.repetition_penalty if expected[token] > 0 else s.repetition_penalty
        for token in set(answers[row]):
            expected[token] -= s.presence_penalty + s.frequency_penalty * answers[row].count(token)
        expected[7] += 3.5
        expected[4] -= 100
        np.testing.assert_allclose(ours[row], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("by", ["seed", "step"])
@pytest.mark.parametrize(
    "s",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.1),
        Sampling(temperature=2.0, min_p=0.05),
    ],
)
def test_draws_follow_the_kept_distribution(s, by):
    """Chi-square over 4096 draws. The seeds are fixed, so this passes always or never: 1e-3 is an unlucky choice."""
    stats = pytest.importorskip("scipy.stats")
    count, prompt = 4096, [3, 4, 5]
    logits = np.random.default_rng(2).normal(0, 2, SMALL).astype(np.float32)
    seeds = range(count) if by == "seed" else [7] * count
    rows = SamplingRows.create([dataclasses.replace(s, seed=seed) for seed in seeds], [prompt] * count, SMALL)
    steps = jnp.zeros(count, jnp.int32) if by == "seed" else jnp.arange(count)
    drawn = np.bincount(np.asarray(run_sample(np.tile(logits, (count, 1)), rows, steps)), minlength=SMALL)
    kept = kept_by_transformers(logits, prompt, s)
    expected = np.exp(kept.astype(np.float64) - kept.max())
    expected *= count / expected.sum()
    assert not drawn[expected == 0].any()
    common = expected >= 5  # the rule of thumb for chi-square; the rest counts as one bin
    observed = np.append(drawn[common], drawn[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    assert stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-3


def test_a_row_does_not_depend_on_its_batch():
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 1, (8, LARGE)).astype(np.float32)
    samplings = [Sampling(temperature=1.0, seed=seed, top_p=0.9 if seed % 2 else 1.0) for seed in range(8)]
    prompts = rng.integers(0, LARGE, (8, 5)).tolist()
    steps = np.arange(8, dtype=np.int32)

    def draw(order):
        rows = SamplingRows.create([samplings[i] for i in order], [prompts[i] for i in order], LARGE)
        return np.asarray(run_sample(logits[order], rows, steps[order]))

    together = draw(np.arange(8))
    assert len(set(together.tolist())) > 4
    np.testing.assert_array_equal(draw(np.arange(8)[::-1]), together[::-1])
    np.testing.assert_array_equal([draw(np.array([i]))[0] for i in range(8)], together)


def test_temperature_0_is_the_likeliest_after_penalties():
    logits = np.zeros((ROWS, SMALL), np.float32)
    logits[:, 7], logits[:, 8] = 2.0, 1.5
    samplings = [Sampling(), Sampling(repetition_penalty=2.0), Sampling(seed=5), Sampling(temperature=1e-3)]
    rows = SamplingRows.create(samplings, [[7]] * ROWS, SMALL)
    assert np.asarray(run_sample(logits, rows, np.zeros(ROWS, np.int32))).tolist() == [7, 8, 7, 7]


def test_the_coldest_temperatures_take_the_likeliest():
    logits = np.zeros((ROWS, SMALL), np.float32)
    logits[:, 7] = 40
    samplings = [Sampling(temperature=t) for t in (1e-300, 1e-40, COLDEST, 1e-5)]
    rows = SamplingRows.create(samplings, [[0]] * ROWS, SMALL)
    assert np.asarray(run_sample(logits, rows, np.zeros(ROWS, np.int32))).tolist() == [7] * ROWS


# --- What may not come ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=12),
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), max_size=4),
    st.integers(0, 4),
)
def test_bad_words_and_repeated_ngrams_are_transformers(tokens, words, size):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    scores = torch.zeros(1, 10)
    if words:
        scores = transformers.NoBadWordsLogitsProcessor(words)(torch.tensor([tokens]), scores)
    if size:
        scores = transformers.NoRepeatNGramLogitsProcessor(size)(torch.tensor([tokens]), scores)
    s = Sampling(bad_words_ids=tuple(map(tuple, words)), no_repeat_ngram_size=size)
    assert sorted(s.banned_after(tokens)) == np.flatnonzero(np.isinf(scores[0].numpy())).tolist()
    assert s.needs_history or s.banned_after(tokens) == s.banned_after([])


def test_what_is_banned_by_step():
    s = Sampling(min_tokens=2, suppress_tokens=(1, 99, -1), begin_suppress_tokens=(2, 99, -1), bad_words_ids=((3,),))
    rows = SamplingRows.create([s, s, s, Sampling()], [[0]] * ROWS, SMALL)
    steps, stops = np.array([0, 1, 2, 0], np.int32), np.array([4, 5, *NO_STOP], np.int32)
    banned = np.isinf(np.asarray(run_ban(np.zeros((ROWS, SMALL), np.float32), rows, steps, stops)))
    assert [np.flatnonzero(row).tolist() for row in banned] == [[1, 2, 3, 4, 5], [1, 3, 4, 5], [1, 3], []]
    few = SamplingRows.create([Sampling(allowed_tokens=(7, 31, 40))] * ROWS, [[0]] * ROWS, SMALL)
    allowed = np.isfinite(np.asarray(run_ban(np.zeros((ROWS, SMALL), np.float32), few, steps, stops)))
    assert [np.flatnonzero(row).tolist() for row in allowed] == [[7, 31, 40]] * ROWS
    longer = SamplingRows.create([Sampling(min_length=7)], [[0] * 5], SMALL)
    assert longer.min_tokens.tolist() == [2]


@pytest.mark.parametrize(
    "s",
    [
        Sampling(temperature=1.0),
        Sampling(repetition_penalty=1.1),
        Sampling(presence_penalty=0.1),
        Sampling(min_tokens=1),
        Sampling(min_length=2),
        Sampling(suppress_tokens=(1,)),
        Sampling(begin_suppress_tokens=(1,)),
        Sampling(bad_words_ids=((1, 2),)),
        Sampling(no_repeat_ngram_size=3),
        Sampling(frequency_penalty=0.1),
        Sampling(logit_bias=((1, 2.0),)),
        Sampling(allowed_tokens=(1,)),
    ],
)
def test_plain_rows_are_those_without_any_rule(s):
    assert SamplingRows.create([Sampling(seed=3, top_k=5), s], [[0]] * 2, SMALL).plain.tolist() == [True, False]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", 1e39, "finite"),
        ("top_k", 2**40, "below"),
        ("repetition_penalty", 1e-40, "positive"),
        ("min_tokens", -1, "at least 0"),
        ("temperature", -0.1, "at least 0"),
        ("temperature", float("nan"), "at least 0"),
        ("temperature", float("inf"), "finite"),
        ("top_k", -1, "at least 0"),
        ("top_p", 0.0, r"in \(0, 1\]"),
        ("top_p", 2.0, r"in \(0, 1\]"),
        ("min_p", -0.5, r"in \[0, 1\]"),
        ("repetition_penalty", 0.0, "positive"),
        ("repetition_penalty", float("inf"), "finite"),
        ("presence_penalty", 3.0, r"in \[-2, 2\]"),
        ("seed", -1, "in"),
        ("seed", 2**32, "in"),
    ],
)
def test_impossible_values_are_refused(name, value, expected):
    with pytest.raises(InputError, match=rf"^{name}=.* is not possible; it must be .*{expected}.*\.$"):
        Sampling(**{name: value})
