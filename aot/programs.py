"""The programs that `qwen-jax compile` compiles: the functions that train and decode, on arguments without data."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qwen_jax.config import ModelConfig, load_config
from qwen_jax.errors import InputError
from qwen_jax.local_path import local_path
from qwen_jax.presets import load_preset

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

    from qwen_jax.backend import Backend
    from train.optimizer import Moments

Step = Literal["train", "prefill", "decode"]
Kind = Literal["bfloat16", "int8", "int4", "nf4"]
CacheDtype = Literal["bfloat16", "int8"]


@dataclasses.dataclass(frozen=True)
class Program:
    """One program: what runs, on which slice, cut up how. Sizes are those of the whole slice."""

    model: str
    """a released model's name, or a folder or config.json file; or the experiment's name"""
    target: str
    """a TPU slice such as v5p:4x4x8 or v5e-16, or a number of GPUs such as h200-8"""
    step: Step
    batch: int
    """rows"""
    sequence: int
    """tokens per row; for decode, slots of the cache"""
    mesh: tuple[tuple[str, int], ...] = ()
    """size of each mesh axis that is not 1"""
    remat: str = "full"
    moments: Moments = "float32"
    accumulate: int = 1
    weights: Kind = "bfloat16"
    """of the layers' matrices, in prefill, decode and under an adapter: int8 by channel, int4 by groups of 128, as GPTQ
    has them, nf4 by groups of 64"""
    cache_dtype: CacheDtype = "bfloat16"
    """of keys and values that are kept"""
    adapter: int = 0
    """rank of LoRA over every projection, which is then all that is trained"""
    experiment: bool = False
    """`model` is an experiment of configs/, whose architecture, objective and optimiser are compiled"""

    @property
    def config(self) -> ModelConfig:
        if self.experiment:
            from aot.experiments import architecture
            from train.config import load_experiment

            return architecture(load_experiment(self.model)[0])
        return load_config(self.model) if local_path(self.model).exists() else load_preset(self.model)

    @property
    def filled_rows(self) -> float:
        """Share of the rows of experts' buffers that hold a token when all experts are used alike."""
        from qwen_jax.layers.sharded_experts import ROOM

        return 1 / ROOM if dict(self.mesh).get("expert", 1) > 1 else 1.0

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Program:
        fields = json.loads(text)
        return cls(**fields | {"mesh": tuple((axis, size) for axis, size in fields["mesh"])})


def build_mesh(program: Program, devices: Sequence[Any]) -> Mesh:
    """The program's mesh over `devices`. Raises InputError when they do not fit each other or the model."""
    from qwen_jax.sharding import MeshConfig, make_mesh

    return make_mesh(MeshConfig(**dict(program.mesh)), devices, model=program.config)


def lower(program: Program, mesh: Mesh) -> jax.stages.Lowered:
    """The program, traced and lowered for the mesh's devices, which need not exist."""
    return _lower_train(program, mesh) if program.step == "train" else _lower_inference(program, mesh)


def _lower_train(program: Program, mesh: Mesh) -> jax.stages.Lowered:
    import jax

    from train.config import load_experiment
    from train.objectives.pretrain import Pretrain
    from train.optimizer import OptimizerConfig
    from train.step import StepConfig, abstract_arguments, jit_train_step

    config, rows, length = program.config, program.batch, program.sequence
    objective, optimizer, settings, steps = Pretrain(), OptimizerConfig(), StepConfig(), 100_000
    if program.experiment:
        run, _ = load_experiment(program.model)
        objective, optimizer, settings, steps = run.objective, run.optimizer, run.step, run.steps
    optimizer = dataclasses.replace(optimizer, moments=program.moments)
    settings = dataclasses.replace(settings, remat=program.remat, accumulate=program.accumulate)
    roles = None
    if program.adapter:
        roles = {"policy": _with_adapter(program, _abstract_params(program, mesh, stacked=True), mesh)}
    arguments = abstract_arguments(config, objective, optimizer, mesh, rows, length, roles)
    step = jit_train_step(config, objective, optimizer, settings, steps, mesh, arguments)
    with jax.set_mesh(mesh):
        return step.lower(*arguments)


def _lower_inference(program: Program, mesh: Mesh) -> jax.stages.Lowered:
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from infer.decode import DecodeState, decode, prefill

    config, rows = program.config, program.batch
    everywhere = NamedSharding(mesh, PartitionSpec())

    def array(shape: tuple[int, ...], dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    params, per_row, stop_ids = _abstract_params(program, mesh, stacked=False), array((rows,)), array((4,))
    static = {"config": config, "vocab_size": config.vocab_size, "num_top": 0}
    if program.step == "prefill":
        arguments = params, array((rows, program.sequence)), per_row, per_row, None, stop_ids
        with jax.set_mesh(mesh), _backend(program, mesh).entered():
            return prefill.lower(*arguments, **static, capacity=program.sequence)
    cache = _abstract_cache(program, mesh)
    state = DecodeState(cache, per_row, per_row, per_row, array((rows,), jnp.bool_), None)
    with jax.set_mesh(mesh), _backend(program, mesh).entered():
        return decode.lower(params, state, array(()), stop_ids, **static)


def _backend(program: Program, mesh: Mesh) -> Backend:
    from qwen_jax.backend import Backend

    kept = np.dtype(np.int8) if program.cache_dtype == "int8" else None
    return dataclasses.replace(Backend.of(mesh), cache_dtype=kept)


def _abstract_params(program: Program, mesh: Mesh, *, stacked: bool) -> Any:
    """bfloat16 parameters, the layers' matrices in `program.weights`; layers stacked or each apart."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    from qwen_jax.leaves import map_arrays
    from qwen_jax.model import abstract, logical_axes
    from qwen_jax.sharding import activation_sharding, check_divides
    from qwen_jax.unstacked import Unstacked

    config = program.config
    check_divides(config, dict(mesh.shape))
    shapes, axes = abstract(config, jnp.bfloat16), logical_axes(config)

    def laid_out(leaf: Any, names: PartitionSpec) -> Any:
        def array(part: jax.ShapeDtypeStruct, names: Sequence[str | None]) -> jax.ShapeDtypeStruct:
            layout = activation_sharding(mesh, part.shape, *names)
            return jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=layout)

        return map_arrays(array, leaf, tuple(names) + (None,) * (leaf.ndim - len(names)))

    def of_layer(path: Any, leaf: jax.ShapeDtypeStruct, names: PartitionSpec) -> Any:
        keys, front = [key.key for key in path], 0 if stacked else 1
        one: Any = jax.ShapeDtypeStruct(leaf.shape[front:], leaf.dtype)
        if keys[-1] in ("kernel", "gate", "up", "down") and "router" not in keys:
            one = jax.eval_shape(lambda dense: _quantised(dense, program.weights, 2 if keys[-2] == "o" else 1), one)
        return laid_out(one, PartitionSpec(*names[front:]))

    layers = jax.tree_util.tree_map_with_path(of_layer, shapes.pop("layers"), axes.pop("layers"))
    layers = layers if stacked else Unstacked([layers] * config.num_layers)
    return jax.tree.map(laid_out, shapes, axes) | {"layers": layers}


def _quantised(dense: jax.Array, weights: Kind, num_in: int) -> Any:
    """A leaf with the shapes of these weights, and the values of none: [*front, *in], of which `num_in` are summed."""
    import jax.numpy as jnp

    from qwen_jax.leaves import Grouped, Int8

    if weights == "bfloat16":
        return dense
    if weights == "int8":
        return Int8.quantise(dense, num_in)
    group, scale = (128, jnp.float16) if weights == "int4" else (64, jnp.float32)
    out, inner = dense.shape[: dense.ndim - num_in], dense.shape[dense.ndim - num_in :]
    groups = math.prod(inner) // group
    codebook = tuple(index / 8 for index in range(-8, 8)) if weights == "nf4" else None
    values, scales = jnp.zeros((*out, groups, group), jnp.int4), jnp.zeros((*out, groups), scale)
    return Grouped(values, scales, codebook=codebook, inner=inner[1:], float_dtype=jnp.dtype(dense.dtype))


def _with_adapter(program: Program, params: Any, mesh: Mesh) -> Any:
    """The parameters with an untrained adapter over each projection, as `train.weights.adapted` lays it out."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from qwen_jax.leaves import Lora
    from qwen_jax.weights.load import get_leaf, put_leaf
    from qwen_jax.weights.names import leaves
    from train.adapter import AdapterConfig, target_of

    everywhere = NamedSharding(mesh, PartitionSpec())
    for leaf in leaves(program.config, "hf"):
        if target_of(leaf) in AdapterConfig().targets:
            base, front, num_in = get_leaf(params, leaf.path), len(leaf.shape) - len(leaf.unit), leaf.num_in
            shape = jax.ShapeDtypeStruct(leaf.shape, np.float32)
            new = jax.eval_shape(
                lambda key, shape=shape, front=front, num_in=num_in: Lora.create(
                    shape, program.adapter, 16.0, key, num_in=num_in, num_front=front
                ).replace(base=None),
                jax.random.key(0),
            )
            a, b = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere) for x in (new.a, new.b))
            put_leaf(params, leaf.path, new.replace(base=base, a=a, b=b))
    return params


def _abstract_cache(program: Program, mesh: Mesh) -> Any:
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from qwen_jax.cache import empty_cache
    from qwen_jax.sharding import activation_sharding

    with jax.set_mesh(mesh), _backend(program, mesh).entered():
        cache = jax.eval_shape(
            lambda lengths: empty_cache(
                program.config, program.batch, program.sequence, jnp.bfloat16, stacked=False, prompt_lengths=lengths
            ),
            jax.ShapeDtypeStruct((program.batch,), jnp.int32),
        )

    def laid_out(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec())
        if leaf.ndim >= 3:
            names = ("batch", "kv_heads", "sequence", "head_dim")[: leaf.ndim]
            sharding = activation_sharding(mesh, leaf.shape, *names)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(laid_out, cache)


def check(program: Program) -> None:
    """Raises InputError for sizes that no program has."""
    if program.batch < 1 or program.sequence < 1 or program.accumulate < 1:
        raise InputError("--batch, --sequence and --accumulate must be at least 1.")
    if program.step != "train" and (program.accumulate != 1 or program.adapter):
        raise InputError("--accumulate and --adapter are of training; leave them out for prefill and decode.")
    if program.step == "train" and program.weights != "bfloat16" and not program.adapter:
        raise InputError(f"--weights {program.weights} is frozen in training; give an --adapter to train over it.")
    if program.step == "train" and program.cache_dtype != "bfloat16":
        raise InputError("--cache-dtype is of prefill and decode; training keeps no keys and values.")
