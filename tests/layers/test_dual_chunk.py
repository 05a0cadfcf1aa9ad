"""Dual Chunk Attention against a dense PyTorch implementation: values, gradients, packing, prefill and decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from infer import parity  # noqa: E402
from infer.qwen import Qwen  # noqa: E402
from infer.sampling import Sampling  # noqa: E402
from qwen_jax.config import DualChunk, ModelConfig  # noqa: E402
from qwen_jax.errors import InputError  # noqa: E402
from qwen_jax.kernels import plain as plain_module  # noqa: E402
from qwen_jax.kernels.spec import AttentionSpec  # noqa: E402
from qwen_jax.layers.rope import rotary_tables, rotate  # noqa: E402
from qwen_jax.layers.sharded_attention import attention  # noqa: E402
from qwen_jax.model import Inputs, forward, init, unembed  # noqa: E402
from tests.infer import tiny  # noqa: E402
from tests.layers.dense_dual_chunk import dense_attention, dense_model  # noqa: E402

CHUNK = DualChunk(chunk_size=40, local_size=8, original_length=64)  # chunks of 32
WIDE = DualChunk(chunk_size=40, local_size=24, original_length=0)  # s < w: chunks of 16, and the clamp is never reached
CONFIG = dataclasses.replace(tiny.CONFIG, dual_chunk=CHUNK)
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 150)).astype(np.int32)


def attend(config: ModelConfig, q, k, v, positions, segments, lengths=None):
    """What the layer does with projected q [B, T, H, h] and k, v [B, T, K, h]."""
    assert config.dual_chunk
    rotary = rotary_tables(config, positions, lengths, dual_chunk=True)
    q = jnp.stack([rotate(q, tables) for tables in rotary.query])
    k, v = jnp.swapaxes(rotate(k, rotary.key), 1, 2), jnp.swapaxes(v, 1, 2)
    chunk_length = config.dual_chunk.chunk_length
    chunks = positions // chunk_length
    spec = AttentionSpec(
        query_segments=segments,
        key_segments=segments,
        chunk_length=chunk_length,
        query_chunks=chunks,
        key_chunks=chunks,
    )
    return attention(q, k, v, spec)


@pytest.mark.parametrize("chunk", [CHUNK, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("prompt_length", [None, 150], ids=["training", "inference"])
@pytest.mark.parametrize("blocked", [False, True], ids=["causal", "mapped"])
def test_values_and_gradients_with_packing(chunk, prompt_length, blocked, monkeypatch):
    """Two documents, of 110 and 40 tokens; positions and chunks begin anew with each."""
    if blocked:  # the path of long sequences: blocks of queries under lax.map
        monkeypatch.setattr(plain_module, "CAUSAL_BLOCKS", 0)
        monkeypatch.setattr(plain_module, "QUERY_BLOCK", 30)
    config = dataclasses.replace(CONFIG, dual_chunk=chunk)
    positions = [*range(110), *range(40)]
    segments = [1] * 110 + [2] * 40
    rng = np.random.default_rng(1)
    q, k, v, weight = (jnp.asarray(rng.normal(size=(150, heads, 8)), jnp.float32) for heads in (4, 2, 2, 4))
    lengths = None if prompt_length is None else jnp.asarray([prompt_length])

    def ours(q, k, v):
        rows = (x[None] for x in (q, k, v))
        return attend(config, *rows, jnp.asarray([positions]), jnp.asarray([segments]), lengths)[0]

    out, gradients = jax.value_and_grad(lambda *qkv: jnp.sum(ours(*qkv) * weight), argnums=(0, 1, 2))(q, k, v)
    tensors = [torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True) for x in (q, k, v)]
    expected = dense_attention(*tensors, positions, segments, chunk, config.rope_theta, prompt_length)
    np.testing.assert_allclose(ours(q, k, v), expected.detach(), atol=5e-6)
    loss = (expected * torch.tensor(np.asarray(weight))).sum()
    loss.backward()
    np.testing.assert_allclose(out, loss.item(), atol=1e-4)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad, atol=2e-5)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(our parameters, prompt_lengths, transformers' model with dense Dual Chunk Attention)."""
    from transformers.models.qwen2 import modeling_qwen2

    params = init(CONFIG, jax.random.key(0))
    plain = dataclasses.replace(CONFIG, dual_chunk=None)
    folder = tiny.save_folder(tmp_path_factory.mktemp("dual_chunk") / "model", plain, params)
    prompt_lengths: list[int | None] = []
    before = modeling_qwen2.apply_rotary_pos_emb
    yield params, prompt_lengths, dense_model(folder, CHUNK, prompt_lengths)
    modeling_qwen2.apply_rotary_pos_emb = before


def test_training(reference):
    """Loss, logits and the gradient of the embedding, without length scaling."""
    params, prompt_lengths, theirs = reference
    prompt_lengths[:] = [None, None]
    ids = torch.tensor(TOKENS, dtype=torch.long)
    out = theirs(ids, labels=ids)
    theirs.zero_grad()
    out.loss.backward()
    loss, gradients = parity.loss_and_gradients(CONFIG, params, TOKENS)
    assert loss == pytest.approx(out.loss.item(), rel=1e-5)
    assert gradients["embed"]["embedding"].shape == theirs.model.embed_tokens.weight.shape
    expected = theirs.model.embed_tokens.weight.grad.numpy()
    assert parity.tensor_error("gradient", expected, np.asarray(gradients["embed"]["embedding"])).value < 1e-4
    found = parity.trace(CONFIG, params, TOKENS)
    prompt_lengths[:] = [150, 150]
    with torch.no_grad():
        assert parity.tensor_error("logits", theirs(ids).logits.numpy(), found.logits).value < 2e-5


def test_prefill_and_decoding(reference):
    """A prompt of 50 and one of 100 (scaled: the original length is 64), decoded over the ends of chunks."""
    params, prompt_lengths, theirs = reference
    model = Qwen(CONFIG, params, tiny.tokenizer())
    prompts = [TOKENS[0, :50].tolist(), TOKENS[1, :100].tolist()]
    answers = model.generate(prompts, Sampling(), max_tokens=50)
    for prompt, answer in zip(prompts, answers, strict=True):
        prompt_lengths[:] = [len(prompt)]
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt + answer.tokens])).logits[0]
        logits = logits[len(prompt) - 1 : -1, : len(tiny.tokenizer())]
        assert answer.tokens == logits.argmax(-1).tolist()
        np.testing.assert_allclose(answer.logprobs, logits.log_softmax(-1).max(-1).values, atol=2e-4)
    assert len(set(answers[1].tokens)) > 5


def test_plain_attention_within_one_chunk():
    """The same bits, and beyond the first chunk something else."""
    params = init(CONFIG, jax.random.key(0))
    plain = dataclasses.replace(CONFIG, dual_chunk=None)

    def logits(config, length):
        inputs = Inputs.training(jnp.asarray(TOKENS[:, :length]))
        return unembed(config, params, forward(config, params, inputs).hidden)

    np.testing.assert_array_equal(logits(CONFIG, 32), logits(plain, 32))
    ours, theirs = logits(CONFIG, 64), logits(plain, 64)
    np.testing.assert_allclose(ours[:, :32], theirs[:, :32], atol=1e-5)
    assert np.abs(ours - theirs)[:, 41:].max() > 0.1


def test_successive_chunk_is_plain_attention_within_the_window():
    """A query less than `local_size` into its chunk sees both chunks at their true distance."""
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 40, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    positions = jnp.arange(40)[None]
    turned_q, turned_k = (rotate(x, rotary_tables(tiny.CONFIG, positions).key) for x in (q, k))
    plain = attention(turned_q, jnp.swapaxes(turned_k, 1, 2), jnp.swapaxes(v, 1, 2), AttentionSpec())
    np.testing.assert_allclose(attend(CONFIG, q, k, v, positions, None), plain, atol=1e-5)


def test_refuses_to_scale_twice():
    from qwen_jax.config import YarnScaling

    with pytest.raises(InputError, match="remove rope_scaling"):
        dataclasses.replace(CONFIG, rope_scaling=YarnScaling(4.0, 64))
