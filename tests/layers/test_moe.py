"""The load-balancing loss against its formula, within a micro-batch and over several."""

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.layers.moe import RouterStats, load_balancing_loss

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
