"""Our numbers against PyTorch's: small random models of every architecture, and the default model."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from infer import parity, torch_reference  # noqa: E402
from infer.parity_texts import TEXTS, folded  # noqa: E402
from qwen_jax.config import MODEL_TYPES, ModelConfig, load_config  # noqa: E402
from qwen_jax.kernels import plain  # noqa: E402
from qwen_jax.layers.moe import load_balancing_loss  # noqa: E402
from qwen_jax.model import Inputs, forward, unstack  # noqa: E402
from qwen_jax.weights.load import load_params  # noqa: E402
from qwen_jax.weights.open import open_checkpoint  # noqa: E402

NUM_TOKENS = 520  # more than a block of queries, so that a rotation or a mask that is slightly wrong shows
PROMPTS = [folded(text, 512) for text in TEXTS]
TOKENS = np.resize([token for prompt in PROMPTS for token in prompt], (3, NUM_TOKENS)).astype(np.int32)
ALL = [(model_type, name) for model_type in MODEL_TYPES for name in torch_reference.variants(model_type)]
# Compiling a gradient takes seconds: these cover every parameter and the loss; the others' are for `make test-slow`.
GRADED = [
    *[("qwen", "plain"), ("qwen", "large_key_bias"), ("qwen2", "tied"), ("qwen2", "large_key_bias")],
    *[("qwen2_moe", "plain"), ("qwen3", "plain"), ("qwen3_moe", "norm_topk_prob")],
]
ONE_OF_EACH = [(model_type, "plain") for model_type in MODEL_TYPES]


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same random weights on both sides."""

    folder: Path
    config: ModelConfig
    reference: Any
    params: dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other cost more than such small models
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    model_type, name = request.param
    folder = tmp_path_factory.mktemp(f"{model_type}-{name}")
    variant = torch_reference.variants(model_type)[name]
    torch_reference.write_random(variant, folder)
    assert load_config(folder) == variant.config  # through PyTorch's own configuration and back
    params = load_params(open_checkpoint(folder), np.float32, progress=False)
    return Pair(folder, variant.config, torch_reference.load(folder), params)


def assert_all_hold(measures: list[parity.Measure]) -> None:
    assert [measure for measure in measures if not measure.holds] == []


def only_tokens(trace: torch_reference.Trace, mask: np.ndarray) -> torch_reference.Trace:
    """The trace at the positions where `mask` [B, T] is true, as one row."""
    return torch_reference.Trace(trace.layers[:, mask], trace.hidden[mask], trace.logits[mask])


@pytest.mark.parametrize("pair", [pair for pair in ALL if pair not in GRADED], indirect=True, ids="-".join)
def test_every_stage(pair: Pair) -> None:
    report = parity.check(pair.folder, PROMPTS, num_tokens=NUM_TOKENS, gradient_tokens=0, greedy_tokens=0)
    assert_all_hold(report.measures)
    names = [measure.name for measure in report.measures if measure.limit is not None]
    layers = [f"layer {i}" for i in range(pair.config.num_layers)]
    assert names == ["embedding", *layers, "final norm", "logits", "log-probabilities"]


@pytest.mark.parametrize(
    "pair",
    [pytest.param(pair, marks=[] if pair in GRADED else [pytest.mark.slow]) for pair in ALL],
    indirect=True,
    ids="-".join,
)
def test_every_stage_and_gradient(pair: Pair) -> None:
    report = parity.check(pair.folder, PROMPTS, num_tokens=NUM_TOKENS, gradient_tokens=NUM_TOKENS, greedy_tokens=0)
    assert_all_hold(report.measures)
    names = [measure.name for measure in report.measures]
    assert "loss" in names and "gradient layers/attention/q/kernel[3]" in names


@pytest.mark.parametrize("pair", [("qwen2", "plain")], indirect=True, ids="-".join)
def test_long_prompt_and_greedy(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "CAUSAL_BLOCKS", 0)  # the path of thousands of tokens, here in two blocks of 512
    report = parity.check(pair.folder, PROMPTS, num_tokens=1024, gradient_tokens=1024, greedy_tokens=40)
    assert_all_hold(report.measures)
    assert report.measures[-1].name == "greedy: tokens that differ, of 6 x 40"


@pytest.mark.parametrize("pair", ONE_OF_EACH, indirect=True, ids="-".join)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_batch(pair: Pair, side: str) -> None:
    lengths = np.array([NUM_TOKENS, 333, 61])[:, None]
    slots = np.arange(NUM_TOKENS)[None]
    mask = slots < lengths if side == "right" else slots >= NUM_TOKENS - lengths
    tokens = np.where(mask, TOKENS, 0)
    expected = torch_reference.trace(pair.reference, tokens, mask.astype(np.int32))
    found = parity.trace(pair.config, pair.params, tokens, mask)
    assert_all_hold(parity.compare_traces(only_tokens(expected, mask), only_tokens(found, mask), limits=True)[0])


@pytest.mark.parametrize("pair", [*ONE_OF_EACH, ("qwen2", "window")], indirect=True, ids="-".join)
def test_packed_documents_do_not_see_each_other(pair: Pair) -> None:
    ends = [0, 200, 201, 460, NUM_TOKENS]
    segment_ids = np.zeros((1, NUM_TOKENS + 8), np.int32)  # and padding after the last
    tokens = np.zeros_like(segment_ids)
    tokens[:, :NUM_TOKENS] = TOKENS[:1]
    for i, (start, end) in enumerate(zip(ends, ends[1:], strict=False)):
        segment_ids[:, start:end] = i + 1
    found = parity.trace(pair.config, pair.params, tokens, segment_ids)
    for start, end in zip(ends, ends[1:], strict=False):
        alone = torch_reference.trace(pair.reference, tokens[:, start:end])
        mask = np.zeros_like(segment_ids, bool)
        mask[:, start:end] = True
        expected = only_tokens(alone, np.ones((1, end - start), bool))
        assert_all_hold(parity.compare_traces(expected, only_tokens(found, mask), limits=True)[0])


DECODED = [*ONE_OF_EACH, ("qwen", "ntk_and_logn"), ("qwen2", "window"), ("qwen2", "yarn")]


@pytest.mark.parametrize("pair", DECODED, indirect=True, ids="-".join)
def test_decoding_with_a_cache(pair: Pair) -> None:
    # 90 -> 123 crosses Qwen1's trained length of 100 while decoding: LogN acts, the rotary base stays
    prompts = [PROMPTS[0][:90], PROMPTS[1][:205], PROMPTS[2][:33]]
    expected = [torch_reference.greedy(pair.reference, np.array([prompt]), 33)[0] for prompt in prompts]
    params = unstack(load_params(open_checkpoint(pair.folder), np.float32, progress=False))
    np.testing.assert_array_equal(parity.greedy(pair.config, params, prompts, 33), expected)


@pytest.mark.parametrize("pair", [("qwen", "ntk_and_logn")], indirect=True, ids="-".join)
def test_dynamic_ntk_looks_at_each_sequence(pair: Pair) -> None:
    mask = np.arange(NUM_TOKENS)[None] < np.array([NUM_TOKENS, 150, 90])[:, None]  # alpha 15, 3 and 1
    tokens = np.where(mask, TOKENS, 0)
    expected = torch_reference.trace(pair.reference, tokens, mask.astype(np.int32))
    found = parity.trace(pair.config, pair.params, tokens, mask)
    assert_all_hold(parity.compare_traces(only_tokens(expected, mask), only_tokens(found, mask), limits=True)[0])


@pytest.mark.parametrize(
    "pair",
    [("qwen2_moe", "plain"), ("qwen2_moe", "norm_topk_prob"), ("qwen3_moe", "plain")],
    indirect=True,
    ids="-".join,
)
def test_load_balancing_loss(pair: Pair) -> None:
    from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

    assert pair.config.moe
    mask = np.arange(NUM_TOKENS)[None] < np.array([NUM_TOKENS, 333, 61])[:, None]
    tokens, ones = np.where(mask, TOKENS, 0), torch.tensor(mask.astype(np.int64))
    with torch.no_grad():
        ids = torch.tensor(tokens, dtype=torch.long)
        logits = pair.reference(ids, attention_mask=ones, output_router_logits=True).router_logits
    expected = load_balancing_loss_func(logits, pair.config.moe.num_experts, pair.config.moe.top_k, ones)

    @jax.jit
    def loss(tokens: jax.Array, mask: jax.Array) -> jax.Array:
        inputs = Inputs.training(tokens, segment_ids=mask)
        return load_balancing_loss(forward(pair.config, pair.params, inputs).router)

    np.testing.assert_allclose(loss(jnp.asarray(tokens), jnp.asarray(mask, jnp.int32)), expected, rtol=1e-6)


def test_qwen1_reference_has_the_released_alphas() -> None:
    module = torch_reference._qwen1_module()
    assert [module.ntk_alpha(n, 8192) for n in (1, 8192, 8193, 16384, 16385, 32768)] == [1, 1, 3, 3, 7, 7]


@pytest.mark.slow
def test_default_model(default_gguf: Path) -> None:
    from qwen_jax.tokenizer import load_tokenizer

    prompts = load_tokenizer(default_gguf).encode_batch(TEXTS)
    assert len(prompts) >= 5 and min(map(len, prompts)) >= parity.GREEDY_PROMPT_TOKENS
    assert_all_hold(parity.check(default_gguf, prompts).measures)


@pytest.mark.slow
def test_default_model_in_bfloat16(default_gguf: Path) -> None:
    from qwen_jax.tokenizer import load_tokenizer

    prompts = load_tokenizer(default_gguf).encode_batch(TEXTS)
    assert_all_hold(parity.check(default_gguf, prompts, dtype="bfloat16").measures)
