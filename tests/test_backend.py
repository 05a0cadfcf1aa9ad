"""The backend is that of the arrays, it is entered, and a function is traced anew for another one."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from qwen_jax.backend import Backend, current_backend
from qwen_jax.sharding import MeshConfig, make_mesh


def device(platform: str, num_cores: int | None = None) -> AbstractDevice:
    return AbstractDevice("some chip", num_cores=num_cores, platform=platform)


@pytest.mark.parametrize(
    ("platform", "cores", "kernels"), [("tpu", 2, "tpu"), ("tpu", None, "tpu"), ("cuda", 132, "gpu"), ("cpu", 4, "cpu")]
)
def test_of_a_device(platform: str, cores: int | None, kernels: str) -> None:
    backend = Backend.of(device(platform, cores))
    assert (backend.kernels, backend.cores) == (kernels, 2 if kernels == "tpu" and cores else 1)


def test_of_arrays_and_meshes() -> None:
    assert Backend.of({"a": [1, None, jnp.zeros(3)]}).kernels == "cpu"
    assert Backend.of({}) == Backend.of(make_mesh(MeshConfig())) == Backend.of(jax.devices()[0])


def test_a_mesh_of_absent_devices_decides() -> None:
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device("tpu"))):
        assert current_backend().kernels == "tpu"
    assert current_backend().kernels == "cpu"


def test_functions_are_traced_anew() -> None:
    @jax.jit
    def kernels_are_for_tpu(x: jax.Array) -> jax.Array:
        return x + (current_backend().kernels == "tpu")

    def run() -> float:
        return float(kernels_are_for_tpu(jnp.zeros(())))

    assert run() == 0
    with Backend("tpu").entered():
        assert run() == 1
        with Backend("gpu").entered():
            assert run() == 0
        assert run() == 1
    assert run() == 0
