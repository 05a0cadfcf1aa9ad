"""The train step: gradients against transformers, micro-batches and meshes against the plain step, and its guards."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.errors import InputError
from qwen_jax.leaves import Int8, Lora
from qwen_jax.presets import load_preset
from qwen_jax.sharding import MeshConfig, make_mesh
from tests.train.tiny import CONFIG, MOE, TIED, full_batch, packed_batch, parameters, start, transformers_model
from train.loop import signals
from train.objectives.pretrain import Pretrain
from train.optimizer import OptimizerConfig, path_name
from train.state import abstract_state, new_state
from train.step import Signals, StepConfig, abstract_arguments, jit_train_step, make_eval_step, make_train_step

OPTIMIZER = OptimizerConfig(
    learning_rate=1e-3, schedule="constant", warmup_steps=0, clip_norm=None, weight_decay=0.0
)  # fmt: skip
EXACT = StepConfig(compute_dtype="float32", remat="none")
# without the balance loss, of which micro-batches have another one by definition
UNBALANCED = dataclasses.replace(MOE, moe=dataclasses.replace(MOE.moe, aux_loss_coef=0.0))


@functools.cache
def compiled(config, step, optimizer):
    """Once for all tests: compiling takes 10 s and more, and running nothing."""
    return jax.jit(make_train_step(config, Pretrain(), optimizer, step, 10))


def one_step(config, batch, step=EXACT, optimizer=OPTIMIZER, params=None):
    state, frozen = start(parameters(config) if params is None else params, optimizer)
    return compiled(config, step, optimizer)(state, frozen, batch)


def gradients(state):
    """Of the first step, out of Adam's first moment."""
    return jax.tree.map(lambda mu: mu / 0.1, state.opt_state[1].mu["policy"])


def assert_trees_close(a, b, tolerance):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert np.max(np.abs(x - y)) <= tolerance * max(np.max(np.abs(y)), 1e-3), jax.tree_util.keystr(path)


@pytest.mark.parametrize("config", [CONFIG, TIED, MOE], ids=["untied", "tied", "moe"])
def test_loss_and_gradients_equal_transformers(config, tmp_path):
    import torch

    params = parameters(config)
    tokens = np.random.default_rng(0).integers(0, 64, (4, 33))
    model = transformers_model(config, params, tmp_path / "model")
    inputs = torch.tensor(tokens)
    extra = {"output_router_logits": True} if config.moe else {}
    out = model(inputs[:, :-1], **extra)
    loss = torch.nn.functional.cross_entropy(out.logits.reshape(-1, 64), inputs[:, 1:].reshape(-1))
    total = loss + (config.moe.aux_loss_coef * out.aux_loss if config.moe else 0)
    total.backward()
    state, metrics = one_step(config, full_batch(tokens), params=params)
    np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-6)
    if config.moe:
        np.testing.assert_allclose(metrics["balance_loss"], out.aux_loss.item(), rtol=1e-5)
    ours = transformers_model(config, gradients(state), tmp_path / "gradients")  # under transformers' names
    for (name, p), gradient in zip(model.named_parameters(), ours.parameters(), strict=True):
        error, largest = (p.grad - gradient).abs().max().item(), p.grad.abs().max().item()
        assert error <= 1e-5 * max(largest, 1e-2), name


@pytest.mark.parametrize(
    "config", [pytest.param(CONFIG, id="dense"), pytest.param(UNBALANCED, id="moe", marks=pytest.mark.slow)]
)
def test_micro_batches_equal_the_whole_batch(config):
    """Rows have different numbers of tokens, so a mean of means would differ."""
    batch = packed_batch(4, 32)
    whole, expected = one_step(config, batch)
    state, metrics = one_step(config, batch, dataclasses.replace(EXACT, accumulate=4))
    assert_trees_close(gradients(state), gradients(whole), 1e-5)
    for name in ("loss", "accuracy", "tokens", "grad_norm"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5)


@pytest.mark.slow
def test_global_batch_balance_is_that_of_the_whole_batch_at_the_last_micro_batch():
    """Equal micro-batches have equal counts, so both variants and the whole batch agree; unequal ones do not."""
    batch = packed_batch(4, 32)
    twice = jax.tree.map(lambda array: np.repeat(array, 2, axis=0), batch)  # micro-batch i is rows i, i + 2, ...
    _, whole = one_step(MOE, twice)
    same = dataclasses.replace(EXACT, accumulate=2)
    for balance in ("global-batch", "micro-batch"):
        _, metrics = one_step(MOE, twice, dataclasses.replace(same, balance=balance))
        np.testing.assert_allclose(metrics["balance_loss"], whole["balance_loss"], rtol=1e-5)
    different = [
        float(one_step(MOE, packed_batch(8, 32), dataclasses.replace(same, balance=b))[1]["balance_loss"])
        for b in ("global-batch", "micro-batch")
    ]
    assert different[0] < different[1]  # a part is never more even than the whole


@pytest.mark.parametrize("balance", [pytest.param("global-batch", marks=pytest.mark.slow), "micro-batch"])
def test_an_empty_micro_batch_counts_nothing(balance):
    """The last batch of finite data is filled up with rows of padding, which may be whole micro-batches."""
    batch = packed_batch(4, 32)
    # twice each is the same mean, and the same program; what is balanced over all so far it would change
    rows = [0, 1, 0, 1] if balance == "micro-batch" else [0, 1]
    full = jax.tree.map(lambda array: array[rows], batch)
    for array in jax.tree.leaves(batch):
        array[2:] = 0
    step = dataclasses.replace(EXACT, accumulate=4, balance=balance)
    state, metrics = one_step(MOE, batch, step)
    assert metrics["good"] == 1
    expected_state, expected = one_step(MOE, full, dataclasses.replace(step, accumulate=len(rows)))
    assert_trees_close(gradients(state), gradients(expected_state), 1e-5)
    np.testing.assert_allclose(metrics["balance_loss"], expected["balance_loss"], rtol=1e-5)


@pytest.mark.parametrize(
    "sizes, config",
    [
        pytest.param(dict(fsdp=4, tensor=2), TIED, id="fsdp and tensor", marks=pytest.mark.slow),
        pytest.param(dict(data=2, fsdp=1, tensor=2, context=2), CONFIG, id="data, tensor and context"),
        pytest.param(dict(fsdp=2, expert=4), UNBALANCED, id="experts", marks=pytest.mark.slow),
    ],
)
def test_every_mesh_makes_the_same_update(sizes, config):
    mesh = make_mesh(MeshConfig(**sizes), model=config)
    rows = 2 * mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["expert"]
    batch = packed_batch(rows, 32)
    expected_state, expected = one_step(config, batch)
    step = dataclasses.replace(EXACT, accumulate=2)
    with jax.set_mesh(mesh):
        arguments = abstract_arguments(config, Pretrain(), OPTIMIZER, mesh, rows, 32)
        on_mesh = jax.tree.map(
            lambda array, like: jax.device_put(array, like.sharding),
            (*start(parameters(config), OPTIMIZER), batch),
            arguments[:3],
        )
        here = signals(mesh, 0, missing=False, stop=False)
        state, metrics = jit_train_step(config, Pretrain(), OPTIMIZER, step, 10, mesh, arguments)(*on_mesh, here)
    names = ["loss", "grad_norm", "tokens", "accuracy"]
    np.testing.assert_allclose([metrics[n] for n in names], [expected[n] for n in names], rtol=1e-5)
    assert_trees_close(gradients(state), gradients(expected_state), 1e-5)


@pytest.mark.parametrize("remat", ["minimal", "full"])
def test_rematerialisation_changes_nothing(remat):
    batch = packed_batch(4, 32)
    expected, _ = one_step(CONFIG, batch)
    state, _ = one_step(CONFIG, batch, dataclasses.replace(EXACT, remat=remat))
    assert_trees_close(gradients(state), gradients(expected), 1e-5)


def test_bfloat16_keeps_float32_weights_and_is_close():
    batch = packed_batch(4, 32)
    expected, metrics32 = one_step(CONFIG, batch)
    state, metrics = one_step(CONFIG, batch, StepConfig())
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.trainable)} == {"float32"}
    np.testing.assert_allclose(metrics["loss"], metrics32["loss"], rtol=2e-3)
    np.testing.assert_allclose(metrics["grad_norm"], metrics32["grad_norm"], rtol=2e-2)


def bfloat16_share(gradient) -> float:
    """Of the entries that are exact bfloat16 numbers, but for what Adam's 0.1 rounds."""
    x = np.asarray(gradient)
    rounded = x.astype(jnp.bfloat16).astype(np.float32)
    return float(np.mean(np.abs(x - rounded) <= 2e-7 * np.abs(x)))


@pytest.mark.parametrize(
    "config, accumulate",
    [
        pytest.param(CONFIG, 1, id="dense"),
        pytest.param(CONFIG, 2, id="micro-batches", marks=pytest.mark.slow),
        pytest.param(MOE, 1, id="moe", marks=pytest.mark.slow),
    ],
)
def test_gradients_are_of_one_dtype(config, accumulate):
    """As they are summed and kept; micro-batches, and what is not of the layers, add up in float32."""
    batch, found = packed_batch(4, 32), {}
    for dtype in ("bfloat16", "float32"):
        step = StepConfig(gradient_dtype=dtype, accumulate=accumulate)
        state, _ = one_step(config, batch, step)
        found[dtype] = gradients(state)
        layers = jax.tree_util.tree_leaves_with_path(found[dtype]["layers"])
        shares = [bfloat16_share(leaf) for path, leaf in layers if path[-1].key == "kernel" or "experts" in str(path)]
        assert bfloat16_share(found[dtype]["lm_head"]["embedding"]) < 0.5
        if dtype == "float32":
            assert max(shares) < 0.5
        elif accumulate == 1:
            assert min(shares) == 1
    for ours, theirs in zip(jax.tree.leaves(found["bfloat16"]), jax.tree.leaves(found["float32"]), strict=True):
        scale = np.max(np.abs(theirs))
        assert np.max(np.abs(ours - theirs)) <= 2**-8 * max(scale, 1e-6)  # half a unit in the last place, two roundings


@pytest.mark.slow
def test_an_adapter_on_frozen_int8_weights_trains():
    """Its gradients are those of the dense weights it stands for, by the chain rule; nothing else has any."""
    params = parameters(CONFIG)
    keys = iter(jax.random.split(jax.random.key(7), 99))

    def adapted(path, leaf, num_front):
        if not re.search("attention/o|mlp/gate|lm_head", path_name(path)):
            return leaf
        num_in = 2 if path_name(path).endswith("attention/o/kernel") else 1
        lora = Lora.create(Int8.quantise(leaf, num_in), 2, 4.0, next(keys), num_in=num_in, num_front=num_front)
        return lora.replace(b=0.1 * jax.random.normal(next(keys), lora.b.shape))

    layers = jax.tree_util.tree_map_with_path(lambda path, leaf: adapted(path, leaf, 1), params["layers"])
    rest = {name: tree for name, tree in params.items() if name != "layers"}
    tree = jax.tree_util.tree_map_with_path(lambda path, leaf: adapted(path, leaf, 0), rest) | {"layers": layers}

    def is_lora(leaf):
        return isinstance(leaf, Lora)

    def part(leaf, trained):
        if not is_lora(leaf):
            return None if trained else leaf
        return leaf.replace(base=None) if trained else leaf.replace(a=None, b=None)

    trainable, frozen = (jax.tree.map(lambda leaf, t=t: part(leaf, t), tree, is_leaf=is_lora) for t in (True, False))
    state = new_state({"policy": trainable}, OPTIMIZER)
    step = jax.jit(make_train_step(CONFIG, Pretrain(), OPTIMIZER, EXACT, 10))
    batch = packed_batch(4, 32)
    after, metrics = step(state, {"policy": frozen}, batch)

    dense = jax.tree.map(lambda leaf: leaf.dense() if is_lora(leaf) else leaf, tree, is_leaf=is_lora)
    expected_state, expected = one_step(CONFIG, batch, params=dense)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-6)
    adapters = jax.tree.leaves(tree, is_leaf=is_lora)
    ours = jax.tree.leaves(gradients(after), is_leaf=is_lora)
    pairs = [(a, d) for a, d in zip(adapters, jax.tree.leaves(gradients(expected_state)), strict=True) if is_lora(a)]
    assert len(pairs) == len(ours) == 3
    for (adapter, of_dense), found in zip(pairs, ours, strict=True):
        _, pull = jax.vjp(lambda a, b, adapter=adapter: adapter.replace(a=a, b=b).dense(), adapter.a, adapter.b)
        for mine, theirs in zip((found.a, found.b), pull(of_dense), strict=True):
            assert np.max(np.abs(mine - theirs)) <= 2e-5 * np.max(np.abs(theirs))


def test_frozen_parameters_stay_and_have_no_moments():
    optimizer = dataclasses.replace(OPTIMIZER, frozen=("^embed/", "^layers/mlp/"))
    params = parameters(CONFIG)
    state, _ = one_step(CONFIG, packed_batch(4, 32), optimizer=optimizer)
    new = state.trainable["policy"]
    assert new["embed"]["embedding"] is None and not jax.tree.leaves(new["layers"]["mlp"])
    assert jax.tree.map(jnp.shape, state.opt_state[1].mu["policy"]) == jax.tree.map(jnp.shape, new)
    moved = jax.tree.map(
        lambda a, b: None if a is None else bool(np.any(a != b)), new, params, is_leaf=lambda x: x is None
    )
    assert moved["lm_head"]["embedding"] and all(jax.tree.leaves(moved["layers"]["attention"]))
    _, whole = one_step(CONFIG, packed_batch(4, 32))
    _, part = one_step(CONFIG, packed_batch(4, 32), optimizer=optimizer)
    assert part["loss"] == whole["loss"]


def test_an_update_that_is_not_finite_is_not_made():
    params = parameters(CONFIG)
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[0].set(jnp.nan)
    state, metrics = one_step(CONFIG, packed_batch(4, 32), params=params)
    assert metrics["good"] == 0 and state.step == 0
    before, _ = start(params, OPTIMIZER)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)
    state, metrics = one_step(CONFIG, packed_batch(4, 32))
    assert metrics["good"] == 1 and state.step == 1


def test_padding_never_matters():
    batch = packed_batch(4, 32)
    padding = batch.segment_ids == 0
    assert padding.any()
    other = batch.replace(
        tokens=np.where(padding, 63 - batch.tokens, batch.tokens),
        targets=np.where(padding, 63 - batch.targets, batch.targets),
    )
    a, _ = one_step(MOE, batch)
    b, _ = one_step(MOE, other)
    assert_trees_close(gradients(a), gradients(b), 1e-6)


def test_the_eval_step_sums_what_the_train_step_averages():
    batch = packed_batch(4, 32)
    _, metrics = one_step(CONFIG, batch)
    state, frozen = start(parameters(CONFIG), OPTIMIZER)
    terms = jax.jit(make_eval_step(CONFIG, Pretrain(), EXACT))(state.trainable, frozen, batch)
    np.testing.assert_allclose(terms["loss"].mean, metrics["loss"], rtol=1e-6)


def test_an_indivisible_batch_is_refused():
    with pytest.raises(InputError, match="micro-batches"):
        one_step(CONFIG, packed_batch(3, 32), dataclasses.replace(EXACT, accumulate=2))


@pytest.mark.parametrize("moments", ["float32", "int8"])
def test_the_step_lowers_from_shapes_alone(moments):
    config = load_preset("qwen2.5-72b")
    optimizer = dataclasses.replace(OPTIMIZER, moments=moments)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2), model=config)
    arguments = abstract_arguments(config, Pretrain(), optimizer, mesh, 4, 512)
    per_device = sum(
        np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(arguments[0])
    )
    expected = config.num_params() * {"float32": 12, "int8": 6}[moments] / 8
    assert per_device < 1.01 * expected
    with jax.set_mesh(mesh):
        lowered = jit_train_step(config, Pretrain(), optimizer, StepConfig(), 10, mesh, arguments).lower(*arguments)
    assert "sharding" in lowered.as_text()[:100000]


@pytest.mark.parametrize("clip_norm", [1.0, None])
def test_the_update_copies_neither_weights_nor_moments(clip_norm):
    model = dataclasses.replace(CONFIG, vocab_size=4096, hidden_size=256, intermediate_size=1024)
    optimizer = dataclasses.replace(OPTIMIZER, clip_norm=clip_norm)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        arguments = abstract_arguments(model, Pretrain(), optimizer, mesh, 1, 16)
        step = jit_train_step(model, Pretrain(), optimizer, EXACT, 10, mesh, arguments)
        memory = step.lower(*arguments).compile().memory_analysis()
    gradients = 4 * model.num_params()
    assert memory.alias_size_in_bytes >= 3 * gradients
    assert memory.temp_size_in_bytes < 1.5 * gradients  # with copies 2.7 and more


def test_a_new_state_is_what_abstract_state_says():
    shapes = functools.partial(jax.tree.map, lambda leaf: (leaf.shape, leaf.dtype))
    concrete = start(parameters(CONFIG), OPTIMIZER)
    assert shapes(concrete) == shapes(abstract_state(CONFIG, Pretrain(), OPTIMIZER))


def test_bad_steps_are_skipped_while_the_policy_allows_and_then_hold():
    """Out of three, with two allowed: not finite, a spike, and one more; then nothing moves any more."""
    step = dataclasses.replace(EXACT, skip_nonfinite=2, spike=3.0)
    update = jax.jit(make_train_step(CONFIG, Pretrain(), OPTIMIZER, step, 100))
    state, frozen = start(parameters(CONFIG), OPTIMIZER)
    good, empty = packed_batch(2, 32), jax.tree.map(np.zeros_like, packed_batch(2, 32))
    bad = good.replace(loss_mask=good.loss_mask * np.float32(np.nan))
    before = state
    state, metrics = update(state, frozen, bad)
    assert (metrics["made"], metrics["good"], state.step, state.guard.skipped) == (1, 0, 1, 1)
    for a, b in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(before.trainable), strict=True):
        np.testing.assert_array_equal(a, b)
    state = state.replace(step=jnp.int32(51), guard=state.guard.replace(grad_norm=jnp.float32(1e-3)))
    state, metrics = update(state, frozen, good)  # far above the mean
    assert (metrics["made"], metrics["good"], state.step, state.guard.skipped) == (1, 0, 52, 2)
    state, metrics = update(state, frozen, good)
    assert (metrics["made"], metrics["good"], state.step, state.guard.skipped) == (0, 0, 52, 2)
    state = state.replace(guard=state.guard.replace(grad_norm=metrics["grad_norm"]))
    none = jnp.zeros(1, jnp.int32)
    for signals_, made in ((Signals(jnp.int32(51), none, none), 0), (Signals(jnp.int32(52), none + 1, none), 0)):
        state, metrics = update(state, frozen, empty, signals_)  # out of turn; no batch
        assert (metrics["made"], state.step, state.guard.skipped) == (made, 52, 2)
    state, metrics = update(state, frozen, good, Signals(jnp.int32(52), none, none + 1))
    assert (metrics["made"], metrics["stop"], state.step) == (1, 1, 53)
