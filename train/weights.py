"""The weights that a run starts from, and those it leaves."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_jax.config import ModelConfig
from qwen_jax.errors import EnvironmentFailed, InputError
from qwen_jax.model import param_shardings
from qwen_jax.presets import load_preset
from qwen_jax.tokenizer import Tokenizer
from qwen_jax.unstacked import restacked
from qwen_jax.weights.checkpoint import Checkpoint
from qwen_jax.weights.export import save_hf, write_config
from qwen_jax.weights.load import ParamsCheckpoint, load_params
from qwen_jax.weights.open import open_checkpoint
from qwen_jax.weights.peft import MergedCheckpoint, save_adapter
from train import adapter
from train.checkpoint import may_pass, reason_of
from train.config import TrainConfig
from train.files import write_whole
from train.optimizer import merge_frozen, path_name
from train.processes import together
from train.state import Roles, TrainState, init_roles


def base_of(config: TrainConfig) -> Checkpoint | None:
    """What `model` names; None where random weights need only its tokenizer and it is a folder with nothing else."""
    folder = Path(config.model)
    if (config.preset or config.architecture) and folder.is_dir() and not (folder / "config.json").exists():
        return None
    return open_checkpoint(config.model)


class HasConfig(Protocol):
    """A checkpoint, or what knows of one the architecture alone."""

    @property
    def config(self) -> ModelConfig: ...


def architecture_of(config: TrainConfig, base: HasConfig | None) -> ModelConfig:
    if config.preset:
        return load_preset(config.preset)
    if config.architecture:
        return config.architecture
    assert base is not None
    changes = {"rope_theta": config.rope_theta, "max_position_embeddings": config.max_position_embeddings}
    return dataclasses.replace(base.config, **{name: value for name, value in changes.items() if value is not None})


def initial(config: TrainConfig, model: ModelConfig, base: Checkpoint | None, mesh: Mesh) -> Roles:
    """The weights of every role, float32."""
    layout = param_shardings(model, mesh)
    if config.preset or config.architecture:
        roles = dict.fromkeys(config.objective.roles, layout)
        make = jax.jit(lambda key: init_roles(model, config.objective, key), out_shardings=roles)
        return make(jax.random.key(config.seed))
    assert base is not None
    progress = sys.stderr.isatty() and jax.process_index() == 0
    params = load_params(base, np.float32, layout, progress=progress)
    first, *others = config.objective.roles
    return {first: params} | {role: jax.tree.map(jnp.copy, params) for role in others}


def adapted(config: TrainConfig, model: ModelConfig, base: Checkpoint | None, mesh: Mesh) -> Roles:
    """The weights as they are stored, quantised or not, with an adapter over them; layers stacked where all are alike.

    Raises InputError where there are no weights, and for objectives of several models.
    """
    if base is None or config.preset or config.architecture:
        raise InputError("an adapter needs weights to lie over, and this run starts from random ones.")
    if len(config.objective.roles) > 1:
        raise InputError("an adapter is trained by objectives of one model alone; leave `adapter` out.")
    progress = sys.stderr.isatty() and jax.process_index() == 0
    dequantise = config.adapter.dequantise or not base.is_quantised
    params = load_params(base, None, param_shardings(model, mesh), dequantise=dequantise, progress=progress)
    params = adapter.adapted(config.adapter, model, restacked(params), config.seed)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def placed(path: Any, leaf: Any) -> Any:
        return jax.device_put(leaf, everywhere) if adapter.is_of_adapter(path) else leaf

    return {role: jax.tree_util.tree_map_with_path(placed, params) for role in config.objective.roles}


def as_stored(config: TrainConfig, base: Checkpoint | None, frozen: Roles) -> Roles:
    """Frozen leaves, or their shapes, in the dtype that the checkpoint they come from has them in."""
    if base is None or config.preset or config.architecture:
        return frozen

    def cast(path: Any, leaf: Any) -> Any:
        dtype = base.dtypes[path_name(path).partition("/")[2]]
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
        return leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, frozen)


def check_export(config: TrainConfig) -> None:
    """Raises InputError when the folder to export to exists and is not of this run, which may replace its own."""
    if config.export and config.export.exists() and not _is_own_export(config):
        raise InputError(f"{config.export} already exists; choose another folder to export to, or remove it first.")


def _is_own_export(config: TrainConfig) -> bool:
    record = config.out / "export.json"
    return record.exists() and json.loads(record.read_bytes()) == str(config.export)


def write(
    config: TrainConfig,
    model: ModelConfig,
    state: TrainState,
    frozen: Roles,
    base: Checkpoint | None,
    tokenizer: Tokenizer,
    say: Callable[[str], None],
) -> None:
    """OUT/final, the policy in float32 in our own form, or the adapter as PEFT's folder, and the export."""
    if config.adapter.is_used:
        assert base is not None
        _write_adapter(config, model, state, base, say)
        return
    params = merge_frozen(state.trainable, frozen)["policy"]
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    final = (config.out / "final").absolute()
    # a layer to a chunk: who reads one layer, as the export does, need not read all
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(), params)
    chunks["layers"] = jax.tree.map(lambda _: ocp.SaveArgs(shard_axes=(0,)), chunks["layers"])
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(final, params, save_args=chunks, force=True)
    except Exception as error:
        if not may_pass(error):
            raise
        raise EnvironmentFailed(
            f"{final} could not be written ({reason_of(error)}); free some space, then run the same command again."
        ) from error
    with together():
        if jax.process_index() == 0:
            write_config(ParamsCheckpoint(params, model, base), final, "float32")
            if base is None:
                tokenizer.save(final)
            say(f"final weights: {final}")
            _export(config, lambda: open_checkpoint(final), say)


def _write_adapter(
    config: TrainConfig, model: ModelConfig, state: TrainState, base: Checkpoint, say: Callable[[str], None]
) -> None:
    everywhere = jax.tree.map(lambda leaf: NamedSharding(leaf.sharding.mesh, PartitionSpec()), state.trainable)
    trainable = jax.jit(lambda tree: tree, out_shardings=everywhere)(state.trainable)
    final = config.out / "final"
    with together():
        if jax.process_index() == 0:
            trained = adapter.adapter_of(model, jax.device_get(trainable["policy"]))
            shutil.rmtree(final, ignore_errors=True)
            save_adapter(trained, model, final, base=config.model)
            say(f"final adapter: {final}")
            _export(config, lambda: MergedCheckpoint(base, trained), say)


def _export(config: TrainConfig, final: Callable[[], Checkpoint], say: Callable[[str], None]) -> None:
    if config.export:
        if config.export.exists():
            shutil.rmtree(config.export)
        write_whole(config.out / "export.json", lambda file: file.write(json.dumps(str(config.export)).encode()))
        save_hf(final(), config.export, dtype=ml_dtypes.bfloat16, progress=False)
        say(f"exported to {config.export}")
