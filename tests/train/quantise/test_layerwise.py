"""What a quantiser sees of a model and says of its loss, beside PyTorch's hooks and sums; folders made and opened."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.config import MoeConfig
from qwen_jax.errors import InputError
from qwen_jax.leaves import Int8
from qwen_jax.model import Inputs, forward, init, unembed
from qwen_jax.sharding import MeshConfig, make_mesh
from qwen_jax.weights.load import ParamsCheckpoint, get_leaf, load_params
from qwen_jax.weights.open import open_checkpoint
from tests.infer import tiny
from train.quantise import methods
from train.quantise.command import main
from train.quantise.layerwise import Quantiser
from train.quantise.methods import Seen

WIDE = dataclasses.replace(
    tiny.CONFIG, hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=64, intermediate_size=256,
    initializer_range=0.05,
)  # fmt: skip
MOE = dataclasses.replace(WIDE, model_type="qwen2_moe", moe=MoeConfig(4, 2, 128, 256))
TOKENS = np.random.default_rng(0).integers(0, 263, (4, 24)).astype(np.int32)
HELD_OUT = np.random.default_rng(1).integers(0, 263, (2, 24)).astype(np.int32)


def exactly(weight: jax.Array, seen: Seen) -> Any:
    """Rounds so little that the network stays what it was."""
    return methods.Grouped(weight.reshape(len(weight), -1, 32), jnp.ones((len(weight), weight.shape[1] // 32)))


def made(config: Any, params: Any, method: Any, mesh: Any = None) -> tuple[Quantiser, list[dict[str, Any]]]:
    quantiser = Quantiser(ParamsCheckpoint(params, config), method, TOKENS, HELD_OUT, mesh=mesh)
    passed = []
    layers = list(quantiser.layers(passed.append))
    assert sum(passed) == quantiser.total()
    return quantiser, layers


def recording(found: list[tuple[tuple[int, ...], np.ndarray, np.ndarray]]) -> Any:
    """A method that keeps what it is told of each matrix."""

    def keep(shape: tuple[int, ...], gram: Any, magnitude: Any) -> None:
        found.append((shape, np.asarray(gram), np.asarray(magnitude)))

    def method(weight: jax.Array, seen: Seen) -> Any:
        jax.debug.callback(functools.partial(keep, weight.shape), *seen, ordered=True)
        return exactly(weight, seen)

    return method


def test_what_matrices_meet_is_what_pytorch_hooks_see(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    params = init(WIDE, jax.random.key(0))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny.save_folder(tmp_path / "m", WIDE, params), dtype=torch.float32
    )
    inputs: dict[str, Any] = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(lambda _, args, out, name=name: inputs.__setitem__(name, args[0]))
    with torch.no_grad():
        model(torch.tensor(TOKENS))
    found: list[Any] = []
    made(WIDE, params, recording(found))
    jax.effects_barrier()
    order = "self_attn.q self_attn.k self_attn.v self_attn.o mlp.gate mlp.up mlp.down".split()
    names = [f"model.layers.{layer}.{name}_proj" for layer in range(2) for name in order]
    assert len(found) == len(names)
    for name, (_, gram, magnitude) in zip(names, found, strict=True):
        rows = inputs[name].reshape(-1, inputs[name].shape[-1]).double()
        wanted = (rows.T @ rows).numpy()
        assert np.abs(gram - wanted).max() < 1e-5 * np.abs(wanted).max(), name
        np.testing.assert_allclose(magnitude, rows.abs().sum(0).numpy(), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp=2,tensor=2", "fsdp=2,expert=2"])
def test_a_mesh_sees_the_same(mesh: str) -> None:
    config = MOE if "expert" in mesh else WIDE
    params = init(config, jax.random.key(0))
    _, alone = made(config, params, methods.int8)
    on_mesh = make_mesh(MeshConfig.parse(mesh), jax.devices()[:4], model=config)
    quantiser, split = made(config, params, methods.int8, on_mesh)
    for a, b in zip(alone, split, strict=True):
        for x, y in zip(*(jax.tree.leaves(each) for each in (a, b)), strict=True):
            np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), atol=1e-6)
    other, _ = made(config, params, methods.int8)
    for a, b in zip(other.loss().errors, quantiser.loss().errors, strict=True):
        assert a.kind == b.kind and abs(a.relative - b.relative) < 1e-4 * a.relative
    assert abs(other.loss().after - quantiser.loss().after) < 1e-4 * other.loss().after


@pytest.mark.parametrize("config", [WIDE, MOE], ids=["dense", "experts"])
def test_the_loss_is_that_of_the_quantised_model(config: Any) -> None:
    params = init(config, jax.random.key(0))
    quantiser, layers = made(config, params, methods.int8)
    loss = quantiser.loss()

    def perplexity(params: Any) -> float:
        hidden = forward(config, params, Inputs.inference(jnp.asarray(HELD_OUT))).hidden
        logits = np.asarray(unembed(config, params, hidden[:, :-1]), np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        return float(np.exp(-np.take_along_axis(logits, HELD_OUT[:, 1:, None], -1).mean()))

    assert abs(perplexity(params) / loss.before - 1) < 1e-5
    changed = jax.tree.map(lambda x: x, params)
    for path in layers[0]:
        leaf = get_leaf(params, path)
        held = [jax.tree.map(jnp.asarray, each[path]) for each in layers]
        rows = [each.astype(jnp.float32).dense() if isinstance(each, Int8) else each for each in held]
        new = jnp.stack([row.reshape(leaf.shape[1:]) for row in rows])
        *parents, last = path.split("/")
        functools.reduce(lambda tree, key: tree[key], parents, changed)[last] = new
    assert abs(perplexity(changed) / loss.after - 1) < 1e-5
    assert loss.after != loss.before and loss.tokens == 46
    # half a step of the channel's largest in 127, uniformly spread, against weights of any shape: below 1 %
    assert all(1e-4 < row.relative < 1e-2 and row.worst >= row.relative * 0.99 for row in loss.errors)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_command_writes_a_folder_that_opens(kind: str, tmp_path: Path, capsys: Any) -> None:
    params = init(WIDE, jax.random.key(0), jnp.bfloat16)
    source = tiny.save_folder(tmp_path / "source", WIDE, params)
    text = tmp_path / "text.txt"
    text.write_text("the theme, there and then\n" * 200)
    options = ["--to", kind, "--calibration", str(text), "--sequences", "4", "--length", "32"]
    assert main([str(source), str(tmp_path / "out"), *options]) == 0
    said = capsys.readouterr().out
    assert "mlp/down" in said and "before" in said and "bits for each parameter" in said
    found = load_params(open_checkpoint(tmp_path / "out"), jnp.float32, progress=False)
    for path in ("attention/q/kernel", "mlp/down/kernel"):
        ours, wanted = (np.asarray(get_leaf(tree["layers"], path), np.float32) for tree in (found, params))
        assert np.linalg.norm(ours - wanted) < {"int8": 0.01, "fp8": 0.04}[kind] * np.linalg.norm(wanted)
    with pytest.raises(InputError, match=r"out already exists"):
        main([str(source), str(tmp_path / "out"), *options])
    with pytest.raises(InputError, match=r"is quantised already"):
        main([str(tmp_path / "out"), str(tmp_path / "again"), *options])
    with pytest.raises(InputError, match=r"gives 4,200 tokens, too few for 416 sequences of 32; give more text"):
        main([str(source), str(tmp_path / "again"), *options[:4], "--sequences", "400", "--length", "32"])
    with pytest.raises(InputError, match=r"nowhere does not exist; --calibration takes text files or the corpora"):
        main([str(source), str(tmp_path / "again"), "--to", kind, "--calibration", str(tmp_path / "nowhere")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source", "text.txt"]
