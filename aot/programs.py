"""The programs that `qwen-jax compile` compiles: the functions that train and decode, on arguments without data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from qwen_jax.config import ModelConfig, load_config
from qwen_jax.errors import InputError
from qwen_jax.local_path import local_path
from qwen_jax.presets import load_preset

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

    from train.optimizer import Moments

Step = Literal["train", "prefill", "decode"]


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
    weights: Literal["bfloat16", "int8"] = "bfloat16"
    """of prefill and decode; int8 stores the layers' matrices in one byte per weight"""
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
    arguments = abstract_arguments(config, objective, optimizer, mesh, rows, length)
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

    params, per_row, stop_ids = _inference_params(program, mesh), array((rows,)), array((4,))
    static = {"config": config, "vocab_size": config.vocab_size, "num_top": 0}
    if program.step == "prefill":
        arguments = params, array((rows, program.sequence)), per_row, per_row, None, stop_ids
        with jax.set_mesh(mesh):
            return prefill.lower(*arguments, **static, capacity=program.sequence)
    cache = _abstract_cache(program, mesh)
    state = DecodeState(cache, per_row, per_row, per_row, array((rows,), jnp.bool_), None)
    with jax.set_mesh(mesh):
        return decode.lower(params, state, array(()), stop_ids, **static)


def _inference_params(program: Program, mesh: Mesh) -> Any:
    """The decoder's parameters: bfloat16, every layer apart; with int8, their matrices as `leaves.Int8`."""
    import functools

    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    from qwen_jax.leaves import Int8, map_arrays
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
        keys = [key.key for key in path]
        one = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        if program.weights == "int8" and keys[-1] in ("kernel", "gate", "up", "down") and "router" not in keys:
            quantise = functools.partial(Int8.quantise, num_in=2 if keys[-2] == "o" else 1)
            one = jax.eval_shape(quantise, one)
        return laid_out(one, PartitionSpec(*names[1:]))

    layer = jax.tree_util.tree_map_with_path(of_layer, shapes.pop("layers"), axes.pop("layers"))
    return jax.tree.map(laid_out, shapes, axes) | {"layers": Unstacked([layer] * config.num_layers)}


def _abstract_cache(program: Program, mesh: Mesh) -> Any:
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from qwen_jax.cache import empty_cache
    from qwen_jax.sharding import activation_sharding

    with jax.set_mesh(mesh):
        cache = jax.eval_shape(
            lambda lengths: empty_cache(
                program.config, program.batch, program.sequence, jnp.bfloat16, stacked=False, prompt_lengths=lengths
            ),
            jax.ShapeDtypeStruct((program.batch,), jnp.int32),
        )

    def laid_out(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec())
        if leaf.ndim == 4:
            sharding = activation_sharding(mesh, leaf.shape, "batch", "kv_heads", "sequence", "head_dim")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(laid_out, cache)


def check(program: Program) -> None:
    """Raises InputError for sizes that no program has."""
    if program.batch < 1 or program.sequence < 1 or program.accumulate < 1:
        raise InputError("--batch, --sequence and --accumulate must be at least 1.")
    if program.step != "train" and program.accumulate != 1:
        raise InputError("--accumulate cuts a training batch; leave it out for prefill and decode.")
