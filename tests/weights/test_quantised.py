"""Folders that other tools quantised: unpacked bit for bit by their own formulas, and run as PyTorch runs the result.

The matrices in data/quantised are those that gptqmodel, llm-compressor and bitsandbytes wrote (README.md there).
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.errors import InputError
from qwen_jax.leaves import Grouped, Int8
from qwen_jax.model import Inputs, forward, param_shardings, unembed
from qwen_jax.sharding import MeshConfig, make_mesh
from qwen_jax.weights.export import save_hf
from qwen_jax.weights.load import get_leaf, load_params
from qwen_jax.weights.open import open_checkpoint
from tests.weights import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

DATA = Path(__file__).parent / "data" / "quantised"
NAMES = sorted(file.stem for file in DATA.glob("*.safetensors"))
CONFIG: dict[str, Any] = {
    "model_type": "qwen2", "vocab_size": 96, "hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "tie_word_embeddings": True, "eos_token_id": 5,
}  # fmt: skip


def stored(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(quantization_config, tensors)."""
    with safetensors.safe_open(DATA / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["quantization_config"])
        return config, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Any], **changes: Any) -> tuple[Path, Any]:
    """A folder with these matrices, the rest as a random model of transformers has it, which is given back."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**CONFIG))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    state = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}
    prefix = "model.layers.0.self_attn."
    del state[f"{prefix}k_proj.weight"], state[f"{prefix}o_proj.weight"]
    state |= {prefix + key: value for key, value in tensors.items()}
    for key in [key for key in tensors if key.endswith(".bias")]:
        with torch.no_grad():
            model.get_parameter(prefix + key).copy_(tensors[key])
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": config | changes}))
    safetensors.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, model.eval()


def bits_of(words: Any, bits: int, count: int) -> Any:
    """Field k of each word, k along a last axis."""
    return torch.stack([(words.long() >> (bits * k)) & (2**bits - 1) for k in range(count)], -1)


def expected(config: dict[str, Any], tensors: dict[str, Any], module: str) -> Any:
    """The writer's dequantised weight, float32 [out, in]: each formula as its tool's code has it, value by value."""
    part = {key.removeprefix(f"{module}."): value for key, value in tensors.items() if key.startswith(f"{module}.")}
    method, bits = config["quant_method"], config.get("bits", 4)
    if method == "gptq":
        q = bits_of(part["qweight"], bits, 32 // bits).movedim(-1, 1).flatten(0, 1)  # [in, out]
        z = bits_of(part["qzeros"], bits, 32 // bits).flatten(1)  # [groups, out]
        if config.get("checkpoint_format") != "gptq_v2":
            z = (z + 1) & (2**bits - 1)
        group = part["g_idx"].long()
        return ((q - z[group]) * part["scales"].float()[group]).T
    if method == "awq":

        def columns(words: Any) -> Any:  # the nibbles of a word are columns 0, 2, 4, 6, 1, 3, 5, 7
            return bits_of(words, 4, 8)[..., [0, 4, 1, 5, 2, 6, 3, 7]].flatten(1)

        q, z = columns(part["qweight"]), columns(part["qzeros"])
        group = torch.arange(len(q)) // config["group_size"]
        return ((q - z[group]) * part["scales"].float()[group]).T
    if method == "bitsandbytes":
        octets = part["weight"].flatten()
        index = torch.stack([octets >> 4, octets & 15], -1).flatten().long()
        state = json.loads(bytes(part["weight.quant_state.bitsandbytes__nf4"].tolist()))
        absmax = part["weight.absmax"]
        if "weight.nested_absmax" in part:
            of_block = part["weight.nested_absmax"].repeat_interleave(state["nested_blocksize"])[: len(absmax)]
            absmax = part["weight.nested_quant_map"][absmax.long()] * of_block + state["nested_offset"]
        values = part["weight.quant_map"][index].reshape(-1, state["blocksize"]) * absmax[:, None]
        return values.reshape(state["shape"])
    if "weight_packed" in part:
        num_out, num_in = part["weight_shape"].tolist()
        q = bits_of(part["weight_packed"], 4, 8).flatten(1)[:, :num_in] - 8
        group = torch.arange(num_in) // 128
        scale = part["weight_scale"].float()
        z = torch.zeros(scale.shape, dtype=torch.long)
        if "weight_zero_point" in part:
            z = bits_of(part["weight_zero_point"], 4, 8).movedim(-1, 1).flatten(0, 1)[:num_out] - 8
        return (q - z[:, group]) * scale[:, group]
    scale, weight = part["weight_scale"].float(), part["weight"].float()
    for axis in (0, 1):
        scale = scale.repeat_interleave(-(-weight.shape[axis] // scale.shape[axis]), axis)
    return weight * scale[: weight.shape[0], : weight.shape[1]]


@pytest.mark.parametrize("name", NAMES)
def test_what_another_tool_wrote(name: str, tmp_path: Path) -> None:
    config, tensors = stored(name)
    folder, model = write(tmp_path / "model", config, tensors)
    checkpoint = open_checkpoint(folder)
    kept = load_params(checkpoint, np.float32, dequantise=False, progress=False)
    widened = load_params(checkpoint, np.float32, progress=False)
    assert checkpoint.dtypes["layers/attention/k/kernel"].itemsize == 2
    for leaf in ("k", "o"):
        wanted = expected(config, tensors, f"{leaf}_proj")
        path = f"attention/{leaf}/kernel"
        weight = get_leaf(kept["layers"][0], path)
        assert isinstance(weight, Grouped | Int8)
        # two int4 lie in a byte, which JAX's own sizes do not say
        held = sum(
            array.size * (0.5 if array.dtype == jnp.int4 else array.itemsize) for array in jax.tree.leaves(weight)
        )
        assert held < (1.1 if "8" in name else 0.6) * np.prod(weight.shape)
        shape = weight.shape
        np.testing.assert_array_equal(weight.dense(), wanted.reshape(shape).numpy())
        np.testing.assert_array_equal(get_leaf(widened["layers"], path)[0], wanted.reshape(shape).numpy())
        with torch.no_grad():
            model.get_parameter(f"model.layers.0.self_attn.{leaf}_proj.weight").copy_(wanted)

    tokens = torch.randint(0, 96, (2, 40))
    with torch.no_grad():
        logits = model(tokens).logits
    for params in (kept, widened):
        ours = np.asarray(run(checkpoint.config, params, tokens.numpy()))
        assert np.linalg.norm(ours - logits.numpy()) <= 2e-5 * np.linalg.norm(logits)
    if name in ("gptq4-asym-act", "ct-fp8-block", "ct-w8a8-dynamic"):
        on_a_mesh(checkpoint, tokens.numpy(), logits.numpy())

    # a folder without quantisation, which transformers reads
    save_hf(checkpoint, tmp_path / "dense", dtype=np.float32, progress=False)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, logits)


def on_a_mesh(checkpoint: Any, tokens: np.ndarray, logits: np.ndarray) -> None:
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), devices=jax.devices()[:4], model=checkpoint.config)
    placed = load_params(
        checkpoint, np.float32, param_shardings(checkpoint.config, mesh), dequantise=False, progress=False
    )
    with jax.set_mesh(mesh):
        ours = np.asarray(run(checkpoint.config, placed, tokens))
    assert np.linalg.norm(ours - logits) <= 2e-5 * np.linalg.norm(logits)


def run(config: Any, params: Any, tokens: np.ndarray) -> jax.Array:
    @jax.jit
    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        return unembed(config, params, forward(config, params, Inputs.inference(tokens)).hidden)

    return logits(params, jnp.asarray(tokens, jnp.int32))


# --- other layouts of the same formats, and what is refused -----------------------------------------------------------


def gptq_parts(rows: int, columns: int, seed: int) -> tuple[dict[str, Any], Any]:
    """Random 4-bit GPTQ parts with groups of 32 and the matrix [rows, columns] that they stand for."""
    rng = np.random.default_rng(seed)
    q, z = rng.integers(0, 16, (columns, rows)), rng.integers(1, 16, (columns // 32, rows))
    scales = (rng.random((columns // 32, rows)) * 0.02).astype(np.float16)
    shifts = 4 * np.arange(8)
    qweight = (q.reshape(-1, 8, rows) << shifts[:, None]).sum(1).astype(np.uint32).view(np.int32)
    qzeros = ((z - 1).reshape(len(z), -1, 8) << shifts).sum(-1).astype(np.uint32).view(np.int32)
    group = np.arange(columns) // 32
    parts = {"qweight": qweight, "qzeros": qzeros, "scales": scales, "g_idx": group.astype(np.int32)}
    dense = ((q - z[group]).astype(np.float32) * scales.astype(np.float32)[group]).T
    return {key: torch.tensor(value) for key, value in parts.items()}, np.ascontiguousarray(dense)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}


@pytest.mark.parametrize("model_type", ["qwen", "qwen3_moe"])
def test_experts_and_one_matrix_for_queries_keys_and_values(model_type: str, tmp_path: Path) -> None:
    state = tiny.qwen1_state() if model_type == "qwen" else tiny.hf_state(model_type)
    config = tiny.QWEN1_CONFIG if model_type == "qwen" else tiny.HF_CONFIGS[model_type]
    quantised, dense = dict(state), dict(state)
    for seed, (name, value) in enumerate(state.items()):
        if value.ndim == 2 and ("c_attn" in name or "experts" in name):
            parts, dense[name] = gptq_parts(*value.shape, seed)
            del quantised[name]
            quantised |= {f"{name.removesuffix('weight')}{part}": array.numpy() for part, array in parts.items()}
    tiny.write_folder(tmp_path / "quantised", config | {"quantization_config": GPTQ}, quantised)
    tiny.write_folder(tmp_path / "dense", config, dense)
    checkpoint = open_checkpoint(tmp_path / "quantised")
    wanted = load_params(open_checkpoint(tmp_path / "dense"), np.float32, progress=False)
    for leaf in checkpoint.leaves:
        out = np.empty(leaf.shape, np.float32)
        checkpoint.read(leaf.path, tuple(map(slice, leaf.shape)), out)
        np.testing.assert_array_equal(out, get_leaf(wanted, leaf.path))
    kept = load_params(checkpoint, np.float32, dequantise=False, progress=False)
    assert any(isinstance(leaf, Grouped) for leaf in jax.tree.leaves(kept, is_leaf=lambda x: isinstance(x, Grouped)))
    tokens = np.random.default_rng(0).integers(0, 96, (2, 20))
    found, logits = run(checkpoint.config, kept, tokens), run(checkpoint.config, wanted, tokens)
    assert np.linalg.norm(found - logits) <= 2e-5 * np.linalg.norm(logits)


def kernel(folder: Path, leaf: str) -> Any:
    kept = load_params(open_checkpoint(folder), np.float32, dequantise=False, progress=False)
    return kept["layers"][0]["attention"][leaf]["kernel"]


def test_gptq_of_two_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {}
    for module, rows in (("k_proj", 128), ("o_proj", 256)):
        parts = {"qweight": (256 // 16, rows), "qzeros": (256 // 64, rows // 16)}
        tensors |= {
            f"{module}.{part}": torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)
            for part, shape in parts.items()
        }
        tensors[f"{module}.scales"] = torch.rand(256 // 64, rows).half()
        tensors[f"{module}.g_idx"] = torch.arange(256, dtype=torch.int32) // 64
    config = GPTQ | {"bits": 2, "group_size": 64}
    folder, _ = write(tmp_path / "model", config, tensors)
    np.testing.assert_array_equal(
        kernel(folder, "o").dense(), expected(config, tensors, "o_proj").reshape(256, 4, 64).numpy()
    )


def test_bitsandbytes_of_eight_bits(tmp_path: Path) -> None:
    """Its code multiplies twice, by a row's largest value and by 1 / 127; one scale instead rounds once less."""
    torch.manual_seed(0)
    tensors = {}
    for module, rows in (("k_proj", 128), ("o_proj", 256)):
        tensors[f"{module}.weight"] = torch.randint(-127, 128, (rows, 256), dtype=torch.int8)
        tensors[f"{module}.SCB"] = torch.rand(rows)
        tensors[f"{module}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
    folder, _ = write(tmp_path / "model", {"quant_method": "bitsandbytes", "load_in_8bit": True}, tensors)
    wanted = tensors["o_proj.weight"] * tensors["o_proj.SCB"][:, None] * 7.874015718698502e-3
    np.testing.assert_allclose(kernel(folder, "o").dense(), wanted.reshape(256, 4, 64).numpy(), rtol=2.4e-7)


def test_bitsandbytes_fp4(tmp_path: Path) -> None:
    config, tensors = stored("bnb-nf4")
    half = torch.tensor([0, 0.0052083333, 2 / 3, 1, 1 / 3, 0.5, 1 / 6, 0.25])
    for module in ("k_proj", "o_proj"):
        tensors[f"{module}.weight.quant_map"] = torch.cat([half, -half])
    wanted = expected(config, tensors, "o_proj").reshape(256, 4, 64).numpy()
    renamed = {name.replace("__nf4", "__fp4"): value for name, value in tensors.items()}
    folder, _ = write(tmp_path / "model", config | {"bnb_4bit_quant_type": "fp4"}, renamed)
    np.testing.assert_array_equal(kernel(folder, "o").dense(), wanted)


def test_qwen3_s_own_fp8(tmp_path: Path) -> None:
    """Its scales are named inverses and multiply all the same."""
    _, tensors = stored("ct-fp8-block")
    renamed = {key.replace("weight_scale", "weight_scale_inv"): value for key, value in tensors.items()}
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
    folder, _ = write(tmp_path / "model", config, renamed)
    checkpoint = open_checkpoint(folder)
    kept = load_params(checkpoint, np.float32, dequantise=False, progress=False)
    wanted = expected({"quant_method": "compressed-tensors"}, tensors, "o_proj").reshape(256, 4, 64)
    np.testing.assert_array_equal(kept["layers"][0]["attention"]["o"]["kernel"].dense(), wanted)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gptq4", {"bits": 3}, "bits is 3, which is not read; known: 4, 8, 2"),
        ("gptq4", {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ("gptq4", {"rotation": "hadamard"}, "unknown key 'rotation' = 'hadamard'; it may change the weights"),
        ("gptq4", {"dynamic": {"+:.*o_proj": {"bits": 8}}}, "other bits .8., which is not read"),
        ("gptq4-v2", {"sym": True}, "zeros that differ, in a checkpoint said to be symmetric"),
        ("awq4", {"version": "gemv"}, "version is 'gemv', which is not read; known: gemm"),
        ("ct-w4a16", {"transform_config": {"config_groups": 1}}, "a transform_config, which turns the weights"),
        ("ct-w4a16", {"format": "nvfp4-pack-quantized"}, "format is 'nvfp4-pack-quantized'"),
        ("ct-w4a16", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ("bnb-nf4", {"quant_method": "hqq"}, "quantised with 'hqq', which is not read; known: gptq, awq"),
        ("bnb-nf4", {"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage is 'bfloat16'"),
    ],
)
def test_what_is_not_read_is_named(name: str, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder, _ = write(tmp_path / "model", *stored(name), **changes)
    with pytest.raises(InputError, match=words):
        load_params(open_checkpoint(folder), dequantise=False, progress=False)


@pytest.mark.parametrize(
    ("name", "part", "words"),
    [
        ("gptq4", "k_proj.scales", "lacks the tensor model.layers.0.self_attn.k_proj.scales"),
        ("ct-w4a16", "o_proj.weight_shape", "lacks the tensor model.layers.0.self_attn.o_proj.weight_shape"),
        ("bnb-nf4-double", "k_proj.weight.nested_absmax", "lacks a part of .*k_proj.weight's nested scales"),
    ],
)
def test_a_part_that_is_missing(name: str, part: str, words: str, tmp_path: Path) -> None:
    config, tensors = stored(name)
    folder, _ = write(tmp_path / "model", config, {key: value for key, value in tensors.items() if key != part})
    with pytest.raises(InputError, match=words):
        open_checkpoint(folder)


def test_a_part_of_another_shape(tmp_path: Path) -> None:
    config, tensors = stored("gptq4")
    folder, _ = write(tmp_path / "model", config, tensors | {"k_proj.qzeros": tensors["k_proj.qzeros"][:1]})
    with pytest.raises(InputError, match=r"qzeros of .*k_proj.weight has shape \(1, 16\), but should have \(2, 16\)"):
        open_checkpoint(folder)
