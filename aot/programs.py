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
    from jax.sharding import Mesh, NamedSharding

Step = Literal["train", "prefill", "decode"]


@dataclasses.dataclass(frozen=True)
class Program:
    """One program: what runs, on which slice, cut up how. Sizes are those of the whole slice."""

    model: str
    """a released model's name, or a folder or config.json file"""
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
    moments: str = "float32"
    accumulate: int = 1
    weights: Literal["bfloat16", "int8"] = "bfloat16"
    """of prefill and decode; int8 stores the layers' matrices in one byte per weight"""

    @property
    def config(self) -> ModelConfig:
        return load_config(self.model) if local_path(self.model).exists() else load_preset(self.model)

    @property
    def filled_rows(self) -> float:
        """Share of the rows of experts' buffers that hold a token when all experts are used alike."""
        moe, devices = self.config.moe, dict(self.mesh).get("expert", 1)
        if not moe or devices == 1:
            return 1.0
        return moe.top_k / (devices * min(moe.top_k, moe.num_experts // devices))

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

    from train.objectives.pretrain import Pretrain
    from train.optimizer import OptimizerConfig
    from train.step import StepConfig, abstract_arguments, jit_train_step

    config, rows, length = program.config, program.batch, program.sequence
    optimizer = OptimizerConfig(moments=program.moments)  # type: ignore[arg-type]
    settings = StepConfig(remat=program.remat, accumulate=program.accumulate)  # type: ignore[arg-type]
    arguments = abstract_arguments(config, Pretrain(), optimizer, mesh, rows, length)
    step = jit_train_step(config, Pretrain(), optimizer, settings, 100_000, mesh, arguments)
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
    """The decoder's parameters: bfloat16, every layer apart; with int8, their matrices in one byte per weight."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from qwen_jax.model import abstract, param_shardings
    from qwen_jax.unstacked import Unstacked

    config = program.config
    shapes, layouts = abstract(config, jnp.bfloat16), param_shardings(config, mesh)

    def whole(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def of_layer(path: Any, leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        names = [key.key for key in path]
        quantised = (
            program.weights == "int8" and names[-1] in ("kernel", "gate", "up", "down") and "router" not in names
        )
        layout = NamedSharding(mesh, PartitionSpec(*sharding.spec[1:]))
        return jax.ShapeDtypeStruct(leaf.shape[1:], jnp.int8 if quantised else leaf.dtype, sharding=layout)

    layer = jax.tree_util.tree_map_with_path(of_layer, shapes.pop("layers"), layouts.pop("layers"))
    return jax.tree.map(whole, shapes, layouts) | {"layers": Unstacked([layer] * config.num_layers)}


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
