"""Every experiment in configs/: it loads, says what it must, and its step fits its model, from shapes alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import pytest

from aot.experiments import architecture
from qwen_jax.errors import InputError
from qwen_jax.sharding import AXES, RULES
from train.batch import abstract_batch
from train.config import experiments, load_experiment
from train.state import abstract_state
from train.step import make_train_step


@pytest.mark.parametrize("name", experiments())
def test_an_experiment_loads_and_its_step_builds(name):
    config, text = load_experiment(name)
    assert f"qwen-jax train {name}" in text
    assert config.out == Path("runs") / name

    # the smallest mesh that the file allows
    mesh = dataclasses.asdict(config.mesh)
    parts = {axis: max(mesh[axis], 1) for axis in AXES}
    rows, length = config.data.batch_size, config.data.sequence_length
    assert rows % (parts["data"] * parts["fsdp"] * parts["expert"] * config.step.accumulate) == 0
    assert set(RULES.batch) == {"data", "fsdp", "expert"}
    assert length % parts["context"] == 0

    model = architecture(config)
    assert model.context_length >= length
    state, frozen = abstract_state(model, config.objective, config.optimizer)
    step = make_train_step(model, config.objective, config.optimizer, config.step, config.steps)
    after, metrics = jax.eval_shape(step, state, frozen, abstract_batch(config.objective.batch, rows, length))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert metrics["loss"].shape == ()


def test_long_context_stages_follow_each_other():
    # arXiv 2501.15383: 4,096, 32,768, 65,536, 131,072, 262,144 and 1e4, 1e6, 1e6, 5e6, 1e7
    names = ["pretrain_0_5b", "long_context_32k", "long_context_64k", "long_context_128k", "long_context_256k"]
    configs = [load_experiment(name)[0] for name in names]
    models = [architecture(config) for config in configs]
    assert [c.data.sequence_length for c in configs] == [4096, 32768, 65536, 131072, 262144]
    assert [m.rope_theta for m in models] == [1e4, 1e6, 1e6, 5e6, 1e7]
    assert [m.max_position_embeddings for m in models] == [4096, 32768, 65536, 131072, 262144]
    shares = [c.data.length_shares for c in configs[2:]]
    assert [(s[0].share, s[0].min_tokens) for s in shares] == [(0.75, 65536), (0.75, 131072), (0.75, 262144)]


def test_tokens_are_those_of_the_reports():
    published = {
        "pretrain_0_5b": 18e12,
        "pretrain_72b": 18e12,
        "pretrain_7b": 2.2e12,
        "pretrain_57b_a14b": 4.5e12,
        "continue_code": 90e9,
        "continue_coder_fim": 5.2e12,
        "continue_coder_repo": 300e9,
    }
    for name, tokens in published.items():
        config, _ = load_experiment(name)
        assert config.steps * config.data.batch_size * config.data.sequence_length == pytest.approx(tokens, rel=2e-3)


def test_a_checkpoints_rope_base_changes_only_when_there_is_a_checkpoint():
    config, _ = load_experiment("pretrain_7b")
    with pytest.raises(InputError, match="starts from random weights"):
        dataclasses.replace(config, rope_theta=1e6)
