"""Folders in few bits: opened by our readers, which other tools' folders prove, and word by word as the tools' are."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qwen_jax.config import ModelConfig, MoeConfig
from qwen_jax.errors import InputError
from qwen_jax.leaves import Grouped, Int8
from qwen_jax.model import Inputs, forward, init, unembed
from qwen_jax.weights.load import ParamsCheckpoint, flatten, get_leaf, load_params
from qwen_jax.weights.names import leaves
from qwen_jax.weights.open import open_checkpoint
from qwen_jax.weights.quantised_export import Layout, is_quantised, save_quantised
from tests.infer import tiny

WIDE = dataclasses.replace(
    tiny.CONFIG, hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=64, intermediate_size=256
)
CONFIGS = {
    "qwen": dataclasses.replace(WIDE, model_type="qwen", num_heads=2, num_kv_heads=2),
    "qwen2": WIDE,
    "qwen2_moe": dataclasses.replace(WIDE, model_type="qwen2_moe", moe=MoeConfig(3, 2, 128, 256)),
    "qwen3": dataclasses.replace(WIDE, model_type="qwen3", tie_word_embeddings=True),
    "qwen3_moe": dataclasses.replace(WIDE, model_type="qwen3_moe", moe=MoeConfig(3, 2, 128, 0, norm_topk_prob=True)),
}
LAYOUTS = {
    "gptq4": Layout("gptq", 4, 64),
    "gptq4, desc_act": Layout("gptq", 4, 64, desc_act=True),
    "gptq8": Layout("gptq", 8, 128),
    "awq": Layout("awq", 4, 64),
    "int8": Layout("int8"),
    "fp8": Layout("fp8"),
}


def coded(layout: Layout, shape: tuple[int, ...], rng: np.random.Generator) -> Any:
    """A random weight [*experts, out, in] as a quantiser makes it."""
    *front, num_out, num_in = shape
    if layout.method == "int8":
        values = rng.integers(-127, 128, shape).astype(np.int8)
        return Int8(values, rng.random(shape[:-1]).astype(ml_dtypes.bfloat16))
    groups = (*front, num_out, num_in // layout.group)
    if layout.method == "fp8":
        values = rng.standard_normal((*groups, layout.group)).astype(ml_dtypes.float8_e4m3fn)
        blocks = rng.random((*front, -(-num_out // 128), groups[-1])).astype(ml_dtypes.bfloat16)
        return Grouped(values, np.repeat(blocks, 128, axis=-2)[..., :num_out, :])
    half = 2 ** (layout.bits - 1)
    dtype = ml_dtypes.int4 if layout.bits == 4 else np.int8
    values = rng.integers(-half, half, (*groups, layout.group)).astype(np.int8).astype(dtype)
    zero = rng.integers(-half, half, groups).astype(np.int8).astype(dtype) if layout.method == "awq" else None
    order = None
    if layout.desc_act:
        order = np.stack([np.arange(num_in)] * int(np.prod(front, initial=1))).reshape(*front, num_in)
        # within a group inputs are in their own order, which a file does not say
        order = np.sort(rng.permuted(order, axis=-1).reshape(*front, -1, layout.group)).reshape(*front, num_in)
        order = order.astype(np.int32)
        order = order if not front else np.broadcast_to(order, (*front, num_in))
    return Grouped(values, rng.random(groups).astype(np.float16), zero, order=order)


def layers(config: ModelConfig, layout: Layout, params: Any) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    made = []
    shared = {}
    for layer in range(config.num_layers):
        found: dict[str, Any] = {}
        for leaf in leaves(config, "hf"):
            if not leaf.path.startswith("layers/"):
                continue
            if is_quantised(leaf):
                front = leaf.shape[1 : len(leaf.shape) - len(leaf.unit)]
                weight = coded(layout, (*front, leaf.rows, int(np.prod(leaf.unit[leaf.row_axes :]))), rng)
                if layout.desc_act and leaf.path.split("/")[1] == "attention" and leaf.path.split("/")[2] in "qkv":
                    order = shared.setdefault(layer, weight.order)  # they have one input
                    weight = weight.replace(order=order)
                found[leaf.path] = weight
            else:
                found[leaf.path] = np.asarray(get_leaf(params, leaf.path)[layer])
        made.append(found)
    return made


CASES = [("qwen2_moe", layout) for layout in LAYOUTS] + [
    ("qwen", "gptq4, desc_act"), ("qwen", "awq"), ("qwen2", "fp8"), ("qwen3", "int8"), ("qwen3_moe", "gptq4"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_folders_open_with_the_same_weights(name: str, layout: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    params = init(config, jax.random.key(0), jnp.bfloat16)
    source = open_checkpoint(tiny.save_folder(tmp_path / "source", config, params))
    made = layers(config, LAYOUTS[layout], params)
    save_quantised(source, tmp_path / "out", LAYOUTS[layout], made, max_shard_bytes=200_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1

    found = open_checkpoint(tmp_path / "out")
    assert found.config == dataclasses.replace(config) and found.is_quantised
    kept = load_params(found, dequantise=False, progress=False)
    for layer, expected in enumerate(made):
        for path, weight in expected.items():
            ours = get_leaf(kept["layers"][layer], path.removeprefix("layers/"))
            if hasattr(weight, "dense"):
                wanted = np.asarray(jax.tree.map(jnp.asarray, weight).astype(jnp.float32).dense())
                np.testing.assert_array_equal(ours.astype(jnp.float32).dense().reshape(wanted.shape), wanted)
            else:
                np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(weight, np.float32), atol=1e-7)
    for path, leaf in flatten({key: params[key] for key in params if key != "layers"}):
        np.testing.assert_allclose(
            np.asarray(get_leaf(kept, path), np.float32), np.asarray(leaf, np.float32), atol=1e-7
        )  # below float16's range bfloat16 goes on
    text = "the théin <|im_start|>"
    assert found.tokenizer().encode(text) == source.tokenizer().encode(text)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_pytorch_by_the_tools_formulas(layout: str, tmp_path: Path) -> None:
    """`expected` unpacks as each tool's code does, and is held against what these tools wrote in test_quantised."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    from tests.weights.test_quantised import expected

    config = dataclasses.replace(CONFIGS["qwen2"], num_layers=1)
    params = init(config, jax.random.key(0), jnp.bfloat16)
    made = layers(config, LAYOUTS[layout], params)
    for name, weight in made[0].items():
        if name.endswith("kernel"):  # of a network's size
            made[0][name] = weight.replace(scale=(weight.scale * 0.02).astype(weight.scale.dtype))
    save_quantised(ParamsCheckpoint(params, config), tmp_path / "out", LAYOUTS[layout], made)
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    how = said.pop("quantization_config")
    tensors = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    state = {}
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part in ("qweight", "weight_scale"):
            state[f"{module}.weight"] = expected(how, tensors, module)
        elif part == "weight_scale_inv":  # which multiplies, despite its name
            scale = tensors[name].float().repeat_interleave(128, 0).repeat_interleave(128, 1)
            state[f"{module}.weight"] = tensors[f"{module}.weight"].float() * scale[: len(tensors[f"{module}.weight"])]
    for name, value in tensors.items():
        if name.endswith(("norm.weight", ".bias", "embed_tokens.weight", "lm_head.weight")):
            state.setdefault(name, value.float())
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**said)).float().eval()
    model.load_state_dict(state)
    tokens = np.random.default_rng(1).integers(0, 320, (2, 40))
    with torch.no_grad():
        wanted = model(torch.tensor(tokens)).logits.numpy()
    found = open_checkpoint(tmp_path / "out")
    kept = load_params(found, jnp.float32, dequantise=False, progress=False)
    hidden = forward(config, kept, Inputs.inference(jnp.asarray(tokens, jnp.int32))).hidden
    ours = np.asarray(unembed(config, kept, hidden))
    assert np.abs(ours - wanted).max() < 2e-5 * np.abs(wanted).max()


def test_words_are_those_of_the_tools(tmp_path: Path) -> None:
    """First words that gptqmodel writes for symmetric weights, and AWQ's order, by hand."""
    safetensors = pytest.importorskip("safetensors.numpy")
    config = CONFIGS["qwen2"]
    params = init(config, jax.random.key(0))
    source = ParamsCheckpoint(params, config)
    for bits, zeros in ((4, 0x77777777), (8, 0x7F7F7F7F)):
        layout = Layout("gptq", bits, 128)
        made = layers(config, layout, params)
        save_quantised(source, tmp_path / f"gptq{bits}", layout, made)
        tensors = safetensors.load_file(tmp_path / f"gptq{bits}" / "model.safetensors")
        assert (tensors["model.layers.1.mlp.down_proj.qzeros"].view(np.uint32) == zeros).all()
        # eight (or four) inputs of one output in a word
        codes = np.asarray(made[1]["layers/mlp/down/kernel"].values).astype(np.int64).reshape(128, 256)[5]
        per_word = 32 // bits
        word = sum(int(code + 2 ** (bits - 1)) << (bits * i) for i, code in enumerate(codes[per_word : 2 * per_word]))
        assert tensors["model.layers.1.mlp.down_proj.qweight"].view(np.uint32)[1, 5] == word
        assert (tensors["model.layers.1.mlp.down_proj.g_idx"] == np.arange(256) // 128).all()
    layout = Layout("awq", 4, 128)
    made = layers(config, layout, params)
    save_quantised(source, tmp_path / "awq", layout, made)
    tensors = safetensors.load_file(tmp_path / "awq" / "model.safetensors")
    codes = np.asarray(made[0]["layers/attention/o/kernel"].values).astype(np.int64).reshape(128, 256)[8:16, 3] + 8
    # AutoAWQ: the nibbles of a word are columns 0, 2, 4, 6, 1, 3, 5, 7
    word = sum(int(codes[column]) << (4 * i) for i, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]))
    assert tensors["model.layers.0.self_attn.o_proj.qweight"].view(np.uint32)[3, 1] == word
    assert tensors["model.layers.0.self_attn.o_proj.scales"].dtype == np.float16


def test_what_config_json_says(tmp_path: Path) -> None:
    """Keys and values that readers decide by; those of the tools' own files, where these name them."""
    config = CONFIGS["qwen2_moe"]
    params = init(config, jax.random.key(0))
    said = {}
    for name, layout in LAYOUTS.items():
        save_quantised(ParamsCheckpoint(params, config), tmp_path / name, layout, layers(config, layout, params))
        said[name] = json.loads((tmp_path / name / "config.json").read_text())
    gptq = said["gptq4, desc_act"]["quantization_config"]
    assert gptq == json.loads((tmp_path / "gptq4, desc_act" / "quantize_config.json").read_text())
    assert {key: gptq[key] for key in ("quant_method", "bits", "group_size", "desc_act", "sym")} == {
        "quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True, "sym": True,
    }  # fmt: skip
    (modules,) = gptq["modules_in_block_to_quantize"]
    assert "mlp.experts.2.down_proj" in modules and "self_attn.q_proj" in modules and "mlp.gate" not in modules
    awq = said["awq"]["quantization_config"]
    assert (awq["version"], awq["zero_point"], awq["bits"]) == ("gemm", True, 4)
    assert "model.layers.1.mlp.gate" in awq["modules_to_not_convert"]
    assert said["awq"]["torch_dtype"] == said["gptq8"]["torch_dtype"] == "float16"
    assert said["fp8"]["quantization_config"]["weight_block_size"] == [128, 128]
    group = said["int8"]["quantization_config"]["config_groups"]["group_0"]
    assert (group["weights"]["strategy"], group["input_activations"]["dynamic"]) == ("channel", True)
    assert said["int8"]["torch_dtype"] == "bfloat16"


def test_matrices_that_do_not_divide() -> None:
    with pytest.raises(
        InputError, match=r"q_proj.weight has 32 inputs, which groups of 128 do not divide; try --group"
    ):
        Layout("gptq", 4).check(tiny.CONFIG)
    with pytest.raises(InputError, match=r"48 inputs, which groups of 32 do not divide; try int8"):
        Layout("awq", 4, 32).check(tiny.CONFIG)
    with pytest.raises(InputError, match=r"of 128 do not divide; try int8"):
        Layout("fp8").check(tiny.CONFIG)
    Layout("int8").check(tiny.CONFIG)


def test_nothing_is_left_of_a_folder_that_fails(tmp_path: Path) -> None:
    config, layout = CONFIGS["qwen2"], LAYOUTS["awq"]
    params = init(config, jax.random.key(0))
    made = layers(config, layout, params)
    made[1]["layers/attention_norm/scale"] = np.full(128, 1e6)
    with pytest.raises(InputError, match=r"input_layernorm.weight has weights beyond float16's range"):
        save_quantised(ParamsCheckpoint(params, config), tmp_path / "out", layout, made)
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="already exists"):
        save_quantised(ParamsCheckpoint(params, config), tmp_path / "out", layout, made)
