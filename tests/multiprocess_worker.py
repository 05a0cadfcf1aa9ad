"""One of several processes: loads a model folder, takes a step on a mesh over all of them, saves. See the test."""

import sys
from pathlib import Path

import jax


def main(rank: int, num_processes: int, address: str, source: Path, destination: Path) -> None:
    jax.distributed.initialize(address, num_processes, rank)
    import orbax.checkpoint as ocp
    from jax.experimental import multihost_utils

    from qwen_jax.model import param_shardings
    from qwen_jax.sharding import MeshConfig, activation_sharding, make_mesh
    from qwen_jax.weights.load import load_params
    from qwen_jax.weights.open import open_checkpoint
    from tests.test_multiprocess import MESH, batch, step

    checkpoint = open_checkpoint(source)
    mesh = make_mesh(MeshConfig(**MESH), model=checkpoint.config)
    shardings = param_shardings(checkpoint.config, mesh)
    params = load_params(checkpoint, shardings=shardings, progress=False)
    rows = {
        name: jax.make_array_from_callback(
            x.shape, activation_sharding(mesh, x.shape, "batch", "sequence"), lambda index, x=x: x[index]
        )
        for name, x in batch().items()
    }
    with jax.set_mesh(mesh):
        params = jax.jit(step, static_argnums=2, donate_argnums=0, out_shardings=shardings)(
            params, rows, checkpoint.config
        )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(destination, params)
    if rank == 0:
        (destination / "config.json").write_bytes((source / "config.json").read_bytes())
    multihost_utils.sync_global_devices("saved")
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), Path(sys.argv[5]))
