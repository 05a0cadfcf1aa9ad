"""The chunked loss against PyTorch's F.cross_entropy, on one device and on meshes, and its memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from qwen_jax.leaves import Int8, Lora
from qwen_jax.sharding import MeshConfig, make_mesh
from train.loss import cross_entropy, logprobs

B, T, D, V = 4, 24, 16, 96
rng = np.random.default_rng(0)
HIDDEN = rng.standard_normal((B, T, D), dtype=np.float32)
HEAD = rng.standard_normal((V, D), dtype=np.float32)
TARGETS = rng.integers(0, V, (B, T), dtype=np.int32)
MASK = (rng.random((B, T)) < 0.6).astype(np.float32)
WEIGHTS = rng.random((B, T), dtype=np.float32) * MASK


def torch_loss(hidden, head, targets, weights, z_loss, dtype=torch.float32):
    """(sum of losses, gradients) as autograd has them."""
    h = torch.tensor(hidden, dtype=dtype, requires_grad=True)
    w = torch.tensor(head, dtype=dtype, requires_grad=True)
    logits = (h @ w.T).float()
    nll = torch.nn.functional.cross_entropy(
        logits.reshape(-1, V), torch.tensor(targets).long().ravel(), reduction="none"
    )
    z = torch.logsumexp(logits, -1).ravel() ** 2
    loss = ((nll + z_loss * z) * torch.tensor(weights).ravel()).sum()
    loss.backward()
    return float(loss.detach()), h.grad.float().numpy(), w.grad.float().numpy(), logits.detach().numpy()


def ours(*args, **kwargs):
    def loss(hidden, head, targets, weights):
        sums = cross_entropy(hidden, head, targets, weights, **kwargs)
        return sums.loss, sums

    (_, sums), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*args)
    return sums, gradients


def close(a, b, tolerance=1e-5):
    a, b = np.asarray(a, np.float32), np.asarray(b)
    assert np.max(np.abs(a - b)) <= tolerance * np.max(np.abs(b))


@pytest.mark.parametrize("chunk", [7, 32, 96, 1024])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("weights", [np.ones_like(MASK), MASK, WEIGHTS], ids=["all", "mask", "weights"])
def test_values_and_gradients_equal_torch(chunk, z_loss, weights):
    expected, d_hidden, d_head, logits = torch_loss(HIDDEN, HEAD, TARGETS, weights, z_loss)
    sums, gradients = ours(HIDDEN, HEAD, TARGETS, weights, z_loss=z_loss, chunk=chunk)
    np.testing.assert_allclose(sums.loss, expected, rtol=1e-6)
    close(gradients[0], d_hidden)
    close(gradients[1], d_head)
    np.testing.assert_allclose(sums.tokens, weights.sum(), rtol=1e-6)
    np.testing.assert_allclose(sums.correct, (weights * (logits.argmax(-1) == TARGETS)).sum(), rtol=1e-6)
    without = cross_entropy(
        HIDDEN, jnp.asarray(HEAD), TARGETS, weights, z_loss=z_loss, chunk=chunk
    )  # the path without gradients
    np.testing.assert_allclose(jax.tree.leaves(without), jax.tree.leaves(sums), rtol=1e-6)


def test_bfloat16_hidden_keeps_a_float32_head_gradient():
    hidden = HIDDEN.astype(jnp.bfloat16)
    rounded = np.asarray(HEAD.astype(jnp.bfloat16), np.float32)
    expected, d_hidden, d_head, _ = torch_loss(np.asarray(hidden, np.float32), rounded, TARGETS, MASK, 0.0)
    sums, gradients = ours(hidden, HEAD, TARGETS, MASK, chunk=10)
    assert gradients[0].dtype == jnp.bfloat16 and gradients[1].dtype == jnp.float32
    np.testing.assert_allclose(sums.loss, expected, rtol=1e-5)
    close(gradients[0], d_hidden, 1e-2)
    close(gradients[1], d_head, 1e-2)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(fsdp=4, tensor=2),
        dict(data=2, fsdp=1, tensor=2, context=2),
        dict(fsdp=2, context=4),
        dict(fsdp=1, tensor=8),
    ],
    ids=str,
)
def test_every_mesh_equals_torch(sizes):
    expected, d_hidden, d_head, _ = torch_loss(HIDDEN, HEAD, TARGETS, WEIGHTS, 1e-3)
    with jax.set_mesh(make_mesh(MeshConfig(**sizes))):
        sums, gradients = ours(HIDDEN, HEAD, TARGETS, WEIGHTS, z_loss=1e-3, chunk=5)
    np.testing.assert_allclose(sums.loss, expected, rtol=1e-6)
    close(gradients[0], d_hidden)
    close(gradients[1], d_head)


def test_rows_that_no_mesh_axis_divides_are_counted_once():
    hidden, targets, weights = HIDDEN[:3, :7], TARGETS[:3, :7], WEIGHTS[:3, :7]
    expected, d_hidden, d_head, _ = torch_loss(hidden, HEAD, targets, weights, 0.0)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, tensor=2, context=2))):
        sums, gradients = ours(hidden, HEAD, targets, weights)
    np.testing.assert_allclose(sums.loss, expected, rtol=1e-6)
    close(gradients[0], d_hidden)
    close(gradients[1], d_head)


def test_no_gather_of_tokens_and_one_reduction_of_the_head():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(lambda *args: cross_entropy(*args, chunk=5).loss, argnums=(0, 1)))
        lowered = program.lower(HIDDEN, HEAD, TARGETS, WEIGHTS)
    loop = lowered.compile().as_text()
    body = [line for line in loop.splitlines() if "while/body" in line]
    collectives = [line for line in body if " all-reduce" in line or " all-gather" in line or " reduce-scatter" in line]
    sizes = {line.split("=")[1].split("{")[0].strip() for line in collectives}
    assert sizes and not any(f"{D}]" in size for size in sizes)  # only the softmax's own [C] sums cross inside the loop


def make(kind: str):
    """(a head that is no array, the dense one that it stands for)."""
    if kind == "int8":
        head = Int8.quantise(jnp.asarray(HEAD))
        return head, head.dense()
    base = Int8.quantise(jnp.asarray(HEAD)) if kind == "lora on int8" else jnp.asarray(HEAD)
    head = Lora.create(base, 4, 8.0, jax.random.key(1))
    head = head.replace(b=jnp.asarray(0.1 * np.random.default_rng(1).standard_normal((V, 4), dtype=np.float32)))
    return head, head.dense()


@pytest.mark.parametrize("kind", ["int8", "lora", "lora on int8"])
@pytest.mark.parametrize(
    "sizes",
    [None, dict(fsdp=4, tensor=2), dict(data=2, fsdp=1, tensor=2, context=2), dict(fsdp=1, tensor=8)],
    ids=str,
)
def test_a_head_of_another_kind_trains_as_the_dense_one_it_stands_for(kind, sizes):
    """What is frozen in it has no gradient; of LoRA's two matrices PyTorch has them by the chain rule."""
    head, dense = make(kind)
    expected, d_hidden, d_head, _ = torch_loss(HIDDEN, np.asarray(dense), TARGETS, WEIGHTS, 1e-3)

    def loss(hidden, trained):
        whole = head.replace(**trained) if trained else head
        sums = cross_entropy(hidden, whole, TARGETS, WEIGHTS, z_loss=1e-3, chunk=5)
        of_each = logprobs(hidden, whole, TARGETS, chunk=7)
        return sums.loss, of_each

    trained = {} if kind == "int8" else {"a": head.a, "b": head.b}
    with jax.set_mesh(make_mesh(MeshConfig(**(sizes or {"fsdp": 1})), None if sizes else jax.devices()[:1])):
        (value, of_each), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(HIDDEN, trained)
        of_logprobs = jax.jit(jax.grad(lambda *given: -jnp.sum(loss(*given)[1] * MASK), argnums=(0, 1)))
        from_logprobs = of_logprobs(HIDDEN, trained)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    logs = torch.log_softmax(torch.tensor(HIDDEN) @ torch.tensor(np.asarray(dense)).T, -1)
    np.testing.assert_allclose(of_each, logs.gather(-1, torch.tensor(TARGETS).long()[..., None])[..., 0], atol=1e-5)
    _, masked_d_hidden, masked_d_head, _ = torch_loss(HIDDEN, np.asarray(dense), TARGETS, MASK, 0.0)
    for (ours_hidden, ours), of_hidden, of_head in (
        (gradients, d_hidden, d_head),
        (from_logprobs, masked_d_hidden, masked_d_head),
    ):
        close(ours_hidden, of_hidden, 3e-5)
        if trained:
            close(ours["a"], head.scaling * np.asarray(head.b).T @ of_head, 3e-5)
            close(ours["b"], head.scaling * of_head @ np.asarray(head.a).T, 3e-5)


def products(head, trained) -> int:
    """Multiplications per token of the compiled loss and gradient, in units of V D."""
    grad = jax.jit(jax.grad(lambda hidden, head: cross_entropy(hidden, head, TARGETS, MASK, chunk=96).loss, trained))
    return round(grad.lower(HIDDEN, head).compile().cost_analysis()["flops"] / (2 * TARGETS.size * V * D))


def test_a_frozen_head_costs_no_gradient():
    assert products(jnp.asarray(HEAD), (0, 1)) == 3 and products(jnp.asarray(HEAD), 0) == 2


def test_logits_never_exist_whole():
    batch, length, width, vocab = 2, 512, 32, 8192
    shapes = [(batch, length, width), (vocab, width), (batch, length), (batch, length)]
    dtypes = [jnp.float32, jnp.float32, jnp.int32, jnp.float32]
    args = [jax.ShapeDtypeStruct(*pair) for pair in zip(shapes, dtypes, strict=True)]
    program = jax.jit(jax.grad(lambda *args: cross_entropy(*args, chunk=64).loss, argnums=(0, 1)))
    memory = program.lower(*args).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * batch * length * vocab / 3


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("sizes", [None, dict(fsdp=2, tensor=2, context=2)], ids=["one device", "mesh"])
def test_logprobs_and_their_gradients_equal_torch(temperature, sizes):
    h, w = torch.tensor(HIDDEN, requires_grad=True), torch.tensor(HEAD, requires_grad=True)
    logs = torch.log_softmax(h @ w.T / temperature, -1)
    expected = logs.gather(-1, torch.tensor(TARGETS).long()[..., None])[..., 0]
    cotangents = rng.standard_normal((B, T)).astype(np.float32)
    (torch.exp(expected) * torch.tensor(cotangents)).sum().backward()

    def loss(hidden, head):
        values = logprobs(hidden, head, TARGETS, temperature=temperature, chunk=10)
        return jnp.sum(jnp.exp(values) * cotangents), values

    with jax.set_mesh(
        make_mesh(
            MeshConfig(
                **(sizes or {"fsdp": 1}),
            ),
            None if sizes else jax.devices()[:1],
        )
    ):
        (_, values), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(HIDDEN, HEAD)
    np.testing.assert_allclose(values, expected.detach().numpy(), atol=1e-5)
    close(gradients[0], h.grad.numpy())
    close(gradients[1], w.grad.numpy())


def test_the_logits_of_logprobs_never_exist_whole_either():
    batch, length, width, vocab = 2, 512, 32, 8192
    shapes = [((batch, length, width), jnp.float32), ((vocab, width), jnp.float32), ((batch, length), jnp.int32)]
    args = [jax.ShapeDtypeStruct(*pair) for pair in shapes]
    program = jax.jit(jax.grad(lambda *args: jnp.sum(jnp.exp(logprobs(*args, chunk=64))), argnums=(0, 1)))
    assert program.lower(*args).compile().memory_analysis().temp_size_in_bytes < 4 * batch * length * vocab / 3
