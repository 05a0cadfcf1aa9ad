"""Every preset against published sizes, against the parameter tree, and against transformers."""

from __future__ import annotations

import json
import math

import jax
import pytest

from qwen_jax import model
from qwen_jax.config import DualChunk, DynamicNtkScaling, ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.presets import load_preset, preset_names, preset_path

NAMES = preset_names()

# Exact sizes: Qwen2.5 and Qwen3 from the released weights, Qwen-7B from its safetensors index; the rest by hand from
# the geometry, written out below.
PARAMS = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen-7b": 7_721_324_544,
}
# total, active, active without embeddings, in billions, as the model cards round them
MOE_BILLIONS = {
    "qwen1.5-moe-a2.7b": ("14.316", "2.689", "2.067"),
    "qwen2-57b-a14b": ("57.409", "14.249", "13.160"),
    "qwen3-30b-a3b": ("30.532", "3.353", "2.731"),
    "qwen3-235b-a22b": ("235.094", "22.191", "20.946"),
}
# one of every architecture and every way of sharing a parameter; transformers has no Qwen1
IN_TRANSFORMERS = [
    *("qwen1.5-0.5b", "qwen1.5-32b-chat", "codeqwen1.5-7b", "qwen1.5-moe-a2.7b", "qwen2-57b-a14b-instruct"),
    *("qwen2.5-0.5b", "qwen2.5-3b-instruct", "qwen2.5-7b-instruct-1m", "qwen2.5-72b", "qwen3-0.6b", "qwen3-32b"),
    *("qwen3-30b-a3b", "qwen3-235b-a22b"),
]


def geometry(name: str) -> ModelConfig:
    """The config without what does not change a shape: presets that differ only there are checked once."""
    ignored = {"max_position_embeddings": 1, "rms_norm_eps": 1.0, "rope_theta": 1.0}
    config = load_preset(name)
    return ModelConfig(
        **vars(config) | ignored | {"rope_scaling": None, "logn_trained_length": None, "dual_chunk": None}
    )


GEOMETRIES = {geometry(name): name for name in reversed(NAMES)}  # the shortest name of each


def params_from_file(name: str) -> int:
    """The number of parameters from the file's own keys, independent of ModelConfig."""
    file = json.loads(preset_path(name).read_text())
    if file["model_type"] == "qwen":
        hidden, layers = file.get("hidden_size", file.get("n_embd")), file.get("num_hidden_layers", file.get("n_layer"))
        width = file.get("intermediate_size", file.get("ffn_hidden_size")) // 2
        c_attn, c_proj = 3 * hidden * hidden + 3 * hidden, hidden * hidden
        return 2 * file["vocab_size"] * hidden + hidden + layers * (c_attn + c_proj + 3 * hidden * width + 2 * hidden)
    hidden, head_dim = file["hidden_size"], file.get("head_dim", file["hidden_size"] // file["num_attention_heads"])
    queries, keys = file["num_attention_heads"] * head_dim, file["num_key_value_heads"] * head_dim
    layer = hidden * (queries + keys + keys) + queries * hidden + 2 * hidden
    layer += 2 * head_dim if file["model_type"].startswith("qwen3") else queries + 2 * keys
    if "num_experts" in file:
        layer += file["num_experts"] * (hidden + 3 * hidden * file["moe_intermediate_size"])
        if "shared_expert_intermediate_size" in file:
            layer += 3 * hidden * file["shared_expert_intermediate_size"] + hidden
    else:
        layer += 3 * hidden * file["intermediate_size"]
    embeddings = file["vocab_size"] * hidden * (1 if file["tie_word_embeddings"] else 2)
    return embeddings + hidden + file["num_hidden_layers"] * layer


@pytest.mark.parametrize("name", PARAMS)
def test_published_size(name):
    assert load_preset(name).num_params() == PARAMS[name]


@pytest.mark.parametrize("name", MOE_BILLIONS)
def test_published_size_of_mixtures(name):
    config = load_preset(name)
    active = config.num_active_params()
    counts = (config.num_params(), active, active - 2 * config.vocab_size * config.hidden_size)
    assert tuple(f"{count / 1e9:.3f}" for count in counts) == MOE_BILLIONS[name]


@pytest.mark.parametrize("name", NAMES)
def test_size_and_round_trip(name):
    config = load_preset(name)
    assert config.num_params() == params_from_file(name)
    assert ModelConfig.from_hf(config.to_hf()) == config
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize("name", GEOMETRIES.values())
def test_parameter_tree_has_that_size(name):
    config = load_preset(name)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.abstract(config))) == config.num_params()


@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_transformers_model_has_that_size(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for mapping in (json.loads(preset_path(name).read_text()), load_preset(name).to_hf()):
        config = transformers.AutoConfig.for_model(**mapping)
        with torch.device("meta"):
            theirs = transformers.AutoModelForCausalLM.from_config(config)
        assert theirs.num_parameters() == load_preset(name).num_params()


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("qwen-")])
def test_transformers_reads_the_same_architecture(name):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**json.loads(preset_path(name).read_text()))
    assert ModelConfig.from_hf(config.to_dict()) == load_preset(name)


def test_what_sets_releases_apart():
    assert load_preset("qwen1.5-4b").rope_theta == 5e6
    assert load_preset("qwen2.5-math-7b").rope_theta == 1e4
    assert load_preset("qwen2.5-7b-instruct-1m").dual_chunk == DualChunk(262144, 8192, 262144)
    assert load_preset("qwen2.5-14b").rms_norm_eps == 1e-5 and load_preset("qwen2.5-14b-instruct").rms_norm_eps == 1e-6
    assert load_preset("qwen3-30b-a3b-instruct-2507").rope_theta == 1e7
    assert load_preset("qwen-7b").rope_scaling == DynamicNtkScaling(8192)
    assert load_preset("qwen-72b").rope_scaling is None and load_preset("qwen-72b").logn_trained_length is None
    old = load_preset("qwen-7b-v1.0")
    assert (old.logn_trained_length, old.max_position_embeddings, old.intermediate_size) == (2048, 6144, 11008)


def test_names_in_any_case_and_with_owner():
    assert load_preset("Qwen/Qwen2.5-Coder-0.5B-Instruct") == load_preset("qwen2.5-coder-0.5b-instruct")


def test_unknown_name_names_the_close_ones():
    with pytest.raises(InputError, match=r"no model named 'qwen-7b-chatt'; did you mean qwen-7b-chat"):
        load_preset("qwen-7b-chatt")
    with pytest.raises(InputError, match=r"`qwen-jax models` lists"):
        load_preset("@@@@")


def test_files_are_readable():
    """Indented by two, keys sorted, as Hugging Face writes them."""
    for name in NAMES:
        text = preset_path(name).read_text()
        assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
