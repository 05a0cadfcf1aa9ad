"""Mixtures of experts: the load-balancing loss against its formula; experts on a mesh against those of one device."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qwen_jax.backend import Backend
from qwen_jax.config import MoeConfig
from qwen_jax.layers import sharded_experts
from qwen_jax.layers.moe import Experts, RouterStats, load_balancing_loss
from qwen_jax.layers.sharded_experts import _Round
from qwen_jax.sharding import MeshConfig, make_mesh

rng = np.random.default_rng(0)


def test_load_balancing_loss_against_the_formula_and_its_global_variant():
    layers, experts, top_k, tokens = 3, 8, 2, 50
    halves = []
    for _ in range(2):
        probs = rng.dirichlet(np.ones(experts), (layers, tokens))
        chosen = np.argsort(-probs, -1)[..., :top_k]
        assignments = np.stack([np.bincount(layer.ravel(), minlength=experts) for layer in chosen])
        halves.append((probs, assignments))

    def stats(probs, assignments):
        return RouterStats(
            jnp.asarray(assignments, jnp.float32), jnp.asarray(probs.sum(1)), jnp.full(layers, probs.shape[1] * 1.0)
        )

    def formula(fraction_of, prob_of):  # transformers' load_balancing_loss_func, by hand
        fraction = fraction_of.sum(0) / (fraction_of.sum() / top_k)
        return experts * (fraction * prob_of.reshape(-1, experts).mean(0)).sum()

    first, second = (stats(*half) for half in halves)
    np.testing.assert_allclose(load_balancing_loss(first), formula(halves[0][1], halves[0][0]), rtol=1e-5)
    both = jax.tree.map(jnp.add, first, second)
    expected = formula(halves[0][1] + halves[1][1], halves[0][0])
    np.testing.assert_allclose(load_balancing_loss(first, both), expected, rtol=1e-5)
    balanced = RouterStats(jnp.full((layers, experts), 5.0), jnp.full((layers, experts), 2.5), jnp.full(layers, 20.0))
    np.testing.assert_allclose(load_balancing_loss(balanced), top_k, rtol=1e-6)


# --- over a mesh ------------------------------------------------------------------------------------------------------


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What jax.lax.ragged_all_to_all does, which XLA:CPU cannot, slice by slice as its documentation has it."""
    devices, me = lax.axis_size(axis_name), lax.axis_index(axis_name)
    per_device = len(input_offsets) // devices
    arrays = (operand, input_offsets, send_sizes, output_offsets)
    operands, begins, sizes, ends = (lax.all_gather(array, axis_name) for array in arrays)
    at = jnp.arange(len(output))
    for source in range(devices):
        for i in range(per_device):
            mine = me * per_device + i
            begin, size, end = begins[source, mine], sizes[source, mine], ends[source, mine]
            taken = jnp.take(operands[source], begin + at - end, axis=0, mode="clip")
            written = (at >= end) & (at < end + size) & (size == recv_sizes[source * per_device + i])
            output = jnp.where(written[:, None], taken, output)
    return output


@pytest.mark.parametrize(("ragged", "room", "uneven"), [(False, 0.4, True), (True, 0.4, True), (False, 1.25, False)])
def test_experts_on_a_mesh_are_those_of_one_device(monkeypatch, ragged, room, uneven):
    """However unevenly they are used, and in however many rounds the rows travel; values and gradients."""
    monkeypatch.setattr(sharded_experts, "ROOM", room)
    if ragged:
        monkeypatch.setattr(lax, "ragged_all_to_all", ragged_all_to_all)
    experts = Experts(MoeConfig(8, 3, 32, 0), 16, 0.3)
    x = jnp.asarray(rng.standard_normal((8, 4, 16)), jnp.float32)
    # tokens of the uneven one fall on experts 4 to 6 alone, which two of four devices hold
    each = [rng.permutation(3) + 4 if uneven else rng.permutation(8)[:3] for _ in range(8 * 4)]
    chosen = jnp.asarray(np.reshape(each, (8, 4, 3)), jnp.int32)
    weights = jnp.asarray(rng.random((8, 4, 3)), jnp.float32)
    params = nn.meta.unbox(experts.init(jax.random.key(0), x, chosen, weights))
    direction = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)

    def loss(params, x, weights):
        y = experts.apply(params, x, chosen, weights)
        return jnp.sum(y * direction), y

    run = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (_, y), gradients = jax.jit(run)(params, x, weights)
    backend = dataclasses.replace(Backend.of(x), ragged_exchange=ragged)
    with backend.entered(), jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=1, expert=4))):
        (_, sharded_y), sharded_gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(
            params, x, weights
        )
    jax.tree.map(
        lambda ours, expected: np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5),
        (sharded_y, sharded_gradients),
        (y, gradients),
    )


def test_rows_of_further_rounds_are_each_sent_once():
    """The parts of a group that travel in successive rounds follow each other at the sender and fill the room."""
    sizes = jnp.asarray(rng.integers(0, 9, (4, 4, 2)), jnp.int32)
    room = 7
    rounds = [_Round.of(i, sizes, room) for i in range(-(-int(jnp.max(jnp.sum(sizes, (0, 2)))) // room))]
    np.testing.assert_array_equal(sum(each.sizes for each in rounds), sizes)
    starts = np.cumsum(sizes.reshape(4, -1), axis=1).reshape(sizes.shape) - sizes
    for sender, receiver, expert in np.ndindex(*sizes.shape):
        sent = [
            int(each.begins[sender, receiver, expert]) + i
            for each in rounds
            for i in range(int(each.sizes[sender, receiver, expert]))
        ]
        first = int(starts[sender, receiver, expert])
        assert sent == list(range(first, first + int(sizes[sender, receiver, expert])))
    for each in rounds[:-1]:
        for receiver in range(4):
            filled = [
                int(each.lands[s, receiver, e]) + i
                for e in range(2)
                for s in range(4)
                for i in range(int(each.sizes[s, receiver, e]))
            ]
            assert filled == list(range(len(filled))) and len(filled) <= room
