"""Which of a folder's files count, and under which names: as `transformers` has it, which opens the same folders."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_jax.errors import InputError
from qwen_jax.weights.load import flatten, load_params
from qwen_jax.weights.open import open_checkpoint
from tests.weights.tiny import HF_CONFIGS, hf_state, write_folder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

NORM = "model.norm.weight"
CONFIG = HF_CONFIGS["qwen2"] | {"num_hidden_layers": 1}
STATE = {
    name: value.astype(np.float32)
    for name, value in hf_state("qwen2").items()
    if not name.startswith(("model.layers.1.", "model.layers.2."))
}
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def ours(folder: Path) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten(load_params(open_checkpoint(folder), progress=False))}


def theirs(folder: Path) -> dict[str, np.ndarray]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: value.numpy() for name, value in model.state_dict().items()}


def put(folder: Path, file: str, state: dict[str, np.ndarray]) -> None:
    """Writes weights as `file`: alone, or an index and the one shard that it names."""
    from safetensors.numpy import save_file

    shard = file.replace(".index.json", "").replace(".", "-00001-of-00001.") if file.endswith(".index.json") else file
    if ".bin" in file:
        torch.save({name: torch.from_numpy(value) for name, value in state.items()}, folder / shard)
    else:
        save_file(state, folder / shard, metadata={"format": "pt"})
    if shard != file:
        index = {"metadata": {}, "weight_map": dict.fromkeys(state, shard)}
        (folder / file).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "present", [some for count in range(1, 5) for some in itertools.combinations(FILES, count)], ids=" ".join
)
def test_which_of_several_files_counts(tmp_path, present):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for i, file in enumerate(present):
        put(tmp_path, file, STATE | {NORM: np.full_like(STATE[NORM], i + 1)})
    np.testing.assert_array_equal(ours(tmp_path)["final_norm/scale"], theirs(tmp_path)[NORM])


def test_an_index_whose_shards_are_gone(tmp_path):
    """What saving anew over a sharded folder leaves."""
    write_folder(tmp_path, CONFIG, STATE)
    index = {"metadata": {}, "weight_map": dict.fromkeys(STATE, "model-00001-of-00009.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    np.testing.assert_array_equal(ours(tmp_path)["final_norm/scale"], theirs(tmp_path)[NORM])


def test_weights_that_config_json_names(tmp_path):
    write_folder(tmp_path, CONFIG, STATE)
    put(tmp_path, "other.safetensors", STATE | {NORM: np.full_like(STATE[NORM], 7)})
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"transformers_weights": "other.safetensors"}))
    np.testing.assert_array_equal(ours(tmp_path)["final_norm/scale"], theirs(tmp_path)[NORM])
    assert ours(tmp_path)["final_norm/scale"][0] == 7


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
OTHER = STATE[EMBED][::-1].copy()
NAMED: dict[str, tuple[dict[str, Any], dict[str, np.ndarray]]] = {
    "tied": ({}, STATE),
    "tied, both": ({}, STATE | {HEAD: STATE[EMBED]}),
    "tied, another head": ({}, STATE | {HEAD: OTHER}),
    "tied, the head alone": ({}, {k: v for k, v in STATE.items() if k != EMBED} | {HEAD: OTHER}),
    "untied": ({"tie_word_embeddings": False}, STATE | {HEAD: OTHER}),
    "saved without the head": ({}, {k.removeprefix("model."): v for k, v in STATE.items()}),
    "saved without the head's prefix": (
        {"tie_word_embeddings": False},
        {k.removeprefix("model."): v for k, v in STATE.items()} | {HEAD: OTHER},
    ),
    "old buffers": ({}, STATE | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}),
}


@pytest.mark.parametrize(("changes", "state"), NAMED.values(), ids=NAMED)
def test_names_and_tied_heads(tmp_path, changes, state):
    found = ours(write_folder(tmp_path, CONFIG | changes, state))
    expected = theirs(tmp_path)
    np.testing.assert_array_equal(found["embed/embedding"], expected[EMBED])
    np.testing.assert_array_equal(found.get("lm_head/embedding", found["embed/embedding"]), expected[HEAD])
    np.testing.assert_array_equal(found["final_norm/scale"], expected[NORM])
    np.testing.assert_array_equal(found["layers/mlp/up/kernel"][0], expected["model.layers.0.mlp.up_proj.weight"])


def test_weights_that_were_never_gathered(tmp_path):
    """ZeRO-3 leaves empty tensors when it is not asked for whole ones."""
    empty = np.empty(0, np.float32)
    for state in (STATE | {EMBED: empty, HEAD: empty}, STATE | {EMBED: empty}, STATE | {HEAD: empty}):
        write_folder(tmp_path / "m", CONFIG, state)
        with pytest.raises(InputError, match=r"has shape \(0,\), but the configuration says \(96, 64\)"):
            open_checkpoint(tmp_path / "m")
        shutil.rmtree(tmp_path / "m")


def test_folders_in_the_place_of_files(tmp_path):
    folder = write_folder(tmp_path / "m", CONFIG, STATE)
    (folder / "model.safetensors").unlink()
    for name in FILES:
        (folder / name).mkdir()
    with pytest.raises(InputError, match="holds no weights"):
        open_checkpoint(folder)


def test_a_configuration_of_more_layers_than_the_file_is_refused_at_once(tmp_path):
    write_folder(tmp_path, CONFIG | {"num_hidden_layers": 10_000}, STATE)
    with pytest.raises(InputError, match=r"lacks the tensor model.layers.1\."):
        open_checkpoint(tmp_path)
