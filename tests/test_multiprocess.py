"""Two processes of four devices each load, take a step and save together; four devices, then one, restore it."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.model import Inputs, forward, init, param_shardings, unembed
from qwen_jax.sharding import MeshConfig, make_mesh
from qwen_jax.weights.load import ParamsCheckpoint, load_params
from qwen_jax.weights.open import open_checkpoint
from qwen_jax.weights.orbax import save_orbax
from tests.infer.tiny import CONFIG, save_folder

MESH = {"fsdp": 2, "tensor": 2, "context": 2}


def batch() -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (4, 32), np.int32)
    return {"tokens": tokens, "targets": np.roll(tokens, -1, axis=1)}


def step(params: Any, rows: dict[str, jax.Array], config: ModelConfig) -> Any:
    """Stochastic gradient descent on the next-token loss."""

    def loss(params: Any) -> jax.Array:
        hidden = forward(config, params, Inputs.training(rows["tokens"]), remat="full").hidden
        logits = unembed(config, params, hidden)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), rows["targets"][..., None], -1))

    return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))


def test_two_processes_then_four_devices_then_one(tmp_path: Path) -> None:
    params = init(CONFIG, jax.random.key(0))
    source, saved = save_folder(tmp_path / "source", CONFIG, params), tmp_path / "saved"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-m", "tests.multiprocess_worker"]
    workers = [
        subprocess.Popen(
            [*command, str(rank), "2", address, str(source), str(saved)], env=env, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors

    expected = jax.jit(step, static_argnums=2)(params, batch(), CONFIG)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4], model=CONFIG)
    on_four = load_params(open_checkpoint(saved), shardings=param_shardings(CONFIG, mesh), progress=False)
    assert len(on_four["layers"]["mlp"]["up"]["kernel"].sharding.device_set) == 4
    for ours, reference in zip(jax.tree.leaves(on_four), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(np.asarray(ours) - reference) <= 1e-5 * np.linalg.norm(reference)

    save_orbax(ParamsCheckpoint(on_four, CONFIG, open_checkpoint(source)), tmp_path / "again", progress=False)
    on_one = load_params(open_checkpoint(tmp_path / "again"), progress=False)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), on_one, on_four))
