"""Every mesh gives the logits and gradients of one device."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from qwen_jax import sharding
from qwen_jax.config import DualChunk, ModelConfig, MoeConfig
from qwen_jax.errors import InputError
from qwen_jax.model import Inputs, forward, init, param_shardings, unembed
from qwen_jax.presets import load_preset
from qwen_jax.sharding import (
    AXES,
    MeshConfig,
    Rules,
    activation_sharding,
    activation_spec,
    check_divides,
    gather_parts,
    make_mesh,
    scatter_sum,
)

DENSE = ModelConfig(
    model_type="qwen2",
    vocab_size=320,
    hidden_size=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    max_position_embeddings=512,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    initializer_range=0.1,
)
MOE = dataclasses.replace(DENSE, model_type="qwen2_moe", moe=MoeConfig(8, 3, 32, 48, norm_topk_prob=True))
DUAL_CHUNK = dataclasses.replace(DENSE, dual_chunk=DualChunk(chunk_size=24, local_size=8, original_length=32))
TIED = dataclasses.replace(DENSE, model_type="qwen3", tie_word_embeddings=True)
BATCH, LENGTH = 8, 64
QUICK = [
    (DENSE, {"context": 4, "tensor": 2}),
    (DENSE, {"tensor": 8}),
    (DENSE, {"data": 2, "fsdp": 4}),
    (TIED, {"fsdp": 2, "tensor": 2, "context": 2}),
    (DUAL_CHUNK, {"context": 4, "fsdp": 2}),
    (MOE, {"data": 2, "expert": 2, "tensor": 2}),
    (MOE, {"fsdp": 2, "expert": 2, "context": 2}),
]
ALL = [
    (config, {axis: size for axis, size in zip(AXES, sizes, strict=True) if size > 1})
    for config in (DENSE, MOE)
    for sizes in itertools.product((1, 2, 4, 8), repeat=5)
    if math.prod(sizes) == 8 and (config.moe or sizes[-1] == 1)
]


def packed_batch(batch: int = BATCH) -> dict[str, jax.Array]:
    """Rows of three documents and padding at the end."""
    tokens = np.random.default_rng(0).integers(0, DENSE.vocab_size, (batch, LENGTH))
    lengths = (20, 30, 10)
    segments = np.concatenate([np.full(n, i + 1) for i, n in enumerate(lengths)] + [np.zeros(LENGTH - sum(lengths))])
    positions = np.concatenate([np.arange(n) for n in (*lengths, LENGTH - sum(lengths))])
    rows = {"tokens": tokens, "segment_ids": np.tile(segments, (batch, 1)), "positions": np.tile(positions, (batch, 1))}
    return {name: jnp.asarray(x, jnp.int32) for name, x in rows.items()}


def loss_and_logits(params: Any, batch: dict[str, jax.Array], config: ModelConfig, remat: Any) -> Any:
    positions, segments = batch["positions"], batch["segment_ids"]
    inputs = Inputs.training(batch["tokens"], segment_ids=segments, rotary_positions=positions)
    out = forward(config, params, inputs, remat=remat)
    logits = unembed(config, params, out.hidden)
    targets = jnp.roll(batch["tokens"], -1, axis=1)
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    balance = 0.0 if out.router is None else 1e-3 * jnp.sum(out.router.prob_sums**2)
    return -jnp.mean(jnp.where(batch["segment_ids"] > 0, logprobs, 0.0)) + balance, logits


def relative_error(ours: Any, reference: Any) -> float:
    return float(np.linalg.norm(np.asarray(ours) - np.asarray(reference)) / np.linalg.norm(np.asarray(reference)))


RUN = jax.value_and_grad(loss_and_logits, has_aux=True)


@functools.cache
def on_one_device(config: ModelConfig, batch_size: int) -> Any:
    params = init(config, jax.random.key(0))
    (_, logits), gradients = jax.jit(RUN, static_argnums=(2, 3))(params, packed_batch(batch_size), config, "none")
    return params, logits, gradients


def check(config: ModelConfig, sizes: dict[str, int], remat: str = "full", batch_size: int = BATCH) -> None:
    batch, (params, logits, gradients) = packed_batch(batch_size), on_one_device(config, batch_size)
    mesh = make_mesh(MeshConfig(**({"fsdp": 1} | sizes)), model=config)
    shardings = param_shardings(config, mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings)
        rows = {k: jax.device_put(x, activation_sharding(mesh, x.shape, "batch", "sequence")) for k, x in batch.items()}
        sharded = jax.jit(RUN, static_argnums=(2, 3), out_shardings=((None, None), shardings))
        (_, sharded_logits), sharded_gradients = sharded(placed, rows, config, remat)
    real = np.asarray(batch["segment_ids"]) > 0
    assert relative_error(np.asarray(sharded_logits)[real], np.asarray(logits)[real]) < 1e-5
    for path, gradient in jax.tree_util.tree_leaves_with_path(sharded_gradients):
        reference = gradients
        for key in path:
            reference = reference[key.key]
        assert relative_error(gradient, reference) < 1e-5, jax.tree_util.keystr(path)


@pytest.mark.parametrize(("config", "sizes"), QUICK, ids=str)
def test_mesh_equals_one_device(config: ModelConfig, sizes: dict[str, int]) -> None:
    check(config, sizes)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "sizes"), ALL, ids=str)
def test_every_mesh_equals_one_device(config: ModelConfig, sizes: dict[str, int]) -> None:
    check(config, sizes)


@pytest.mark.parametrize("remat", ["none", "minimal", "dots", "offload"])
def test_remat_policies_change_no_value(remat: str) -> None:
    check(DENSE, {"fsdp": 8}, remat)


def test_ring_where_heads_do_not_divide() -> None:
    """6 heads over context=4 cannot be exchanged, so keys and values go around."""
    check(dataclasses.replace(DENSE, num_heads=6), {"context": 4, "fsdp": 2})


def test_batch_that_does_not_divide_is_computed_whole() -> None:
    check(MOE, {"expert": 4, "fsdp": 2}, batch_size=2)


@pytest.mark.parametrize(
    ("model", "sizes", "sentence"),
    [
        ("qwen2.5-0.5b", {"tensor": 8}, "14 attention heads; these do: 1, 2\\."),
        ("qwen2.5-7b", {"tensor": 8}, "28 attention heads; these do: 1, 2, 4\\."),
        ("qwen2.5-7b", {"expert": 8}, "this model is dense"),
        ("qwen1.5-moe-a2.7b", {"expert": 8}, "60 experts; these do: 1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60"),
        ("qwen2.5-7b", {"fsdp": 3}, "there are 8"),
        ("qwen2.5-7b", {"fsdp": 0}, "sizes are at least 1"),
    ],
)
def test_impossible_meshes_are_refused_in_one_sentence(model: str, sizes: dict[str, int], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        make_mesh(MeshConfig(**({"fsdp": 1} | sizes)), model=load_preset(model))


def test_rules_that_collide_are_an_error() -> None:
    with pytest.raises(InputError, match="mesh axis 'tensor' twice"):
        Rules(embed=("tensor",)).spec(("heads", "head_dim", "embed"))
    with pytest.raises(InputError, match="no rule for the logical axis 'width'"):
        Rules().spec(("width",))


def test_activations_split_only_where_they_divide() -> None:
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, context=2))
    assert activation_spec(mesh, (4, 1, 64), "batch", "residual", None) == PartitionSpec("fsdp", None, None)
    assert activation_spec(mesh, (3, 8, 64), "batch", "residual", None) == PartitionSpec(
        None, ("context", "tensor"), None
    )


@pytest.mark.parametrize("num_devices", [1, 4, 8, 16, 64, 128, 256, 512])
@pytest.mark.parametrize("model", ["qwen2.5-0.5b", "qwen2.5-7b", "qwen2.5-72b", "qwen2-57b-a14b", "qwen3-30b-a3b"])
def test_auto_meshes_fit_model_and_devices(model: str, num_devices: int) -> None:
    config = load_preset(model)
    sizes = MeshConfig.auto(config, num_devices).sizes(num_devices)
    check_divides(config, dict(zip(AXES, sizes, strict=True)))


def test_sums_over_a_square_of_chips_leave_the_same_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In two stages as in one, and as the gradient of a gather."""
    mesh = make_mesh(MeshConfig(fsdp=4), jax.devices()[:4])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3, 8)), jnp.float32)

    def parts(x: jax.Array) -> jax.Array:
        return scatter_sum(x[0], "fsdp", 1)[None]

    def gathered(x: jax.Array) -> jax.Array:
        return gather_parts(x, "fsdp", 2)

    whole = PartitionSpec("fsdp", None, None)
    for square in (4, 2):
        monkeypatch.setattr(sharding, "SQUARE", square)
        scattered = jax.shard_map(parts, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)(x)
        np.testing.assert_allclose(jnp.concatenate(list(scattered), axis=1), jnp.sum(x, axis=0), rtol=1e-6, atol=1e-6)
        split = PartitionSpec(None, None, "fsdp")
        gather = jax.shard_map(gathered, mesh=mesh, in_specs=split, out_specs=whole, check_vma=False)
        _, pull = jax.vjp(gather, x[:1])
        np.testing.assert_allclose(pull(x)[0], jnp.sum(x, axis=0, keepdims=True), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "num_devices", "num_slices", "sizes"),
    [
        ("qwen2.5-72b", 512, 2, {"data": 2, "fsdp": 32, "tensor": 8}),
        ("qwen2.5-7b", 64, 1, {"fsdp": 32, "tensor": 2}),
        ("qwen2-57b-a14b", 64, 1, {"fsdp": 8, "expert": 8}),
    ],
)
def test_mesh_where_none_is_given(model: str, num_devices: int, num_slices: int, sizes: dict[str, int]) -> None:
    chosen = MeshConfig().for_model(load_preset(model), num_devices, num_slices)
    assert chosen == MeshConfig(**({"fsdp": 1} | sizes))
    assert MeshConfig(tensor=2).for_model(load_preset(model), num_devices, num_slices) == MeshConfig(tensor=2)


@dataclasses.dataclass(frozen=True)
class _Chip:
    """A TPU that is not here."""

    slice_index: int
    x: int
    y: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    process_index: int = 0
    core_on_chip: int = 0

    @property
    def coords(self) -> tuple[int, int, int]:
        return (self.x, self.y, 0)

    @property
    def id(self) -> int:
        return self.slice_index * 4 + self.x + 2 * self.y


def test_slices_lie_along_data() -> None:
    """Devices of two slices: copies of the model in each, and nothing else may cross."""
    devices = [_Chip(slice_index, i % 2, i // 2) for slice_index in (1, 0) for i in range(4)]
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices)
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {1}]
    with pytest.raises(InputError, match="data must be a multiple of 2"):
        make_mesh(MeshConfig(fsdp=8), devices)
