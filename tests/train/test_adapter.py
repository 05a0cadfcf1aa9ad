"""Adapters beside PEFT in PyTorch: the same logits, losses and folders, over dense and quantised weights."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from qwen_jax.errors import InputError
from qwen_jax.leaves import Int8
from qwen_jax.model import Inputs, Params, forward, unembed, unstack
from qwen_jax.unstacked import restacked
from qwen_jax.weights.export import save_hf
from qwen_jax.weights.load import ParamsCheckpoint, flatten, get_leaf, load_params
from qwen_jax.weights.open import open_checkpoint
from qwen_jax.weights.peft import MergedCheckpoint, apply_adapter, read_adapter, save_adapter
from tests.train.runs import MODEL, make_run, run
from tests.train.tiny import CONFIG, TIED, full_batch, parameters, start
from train.adapter import AdapterConfig, adapted, adapter_of
from train.data.corpora import corpus_file
from train.objectives.pretrain import Pretrain
from train.optimizer import OptimizerConfig, merge_frozen
from train.step import StepConfig, make_train_step

peft = pytest.importorskip("peft")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, warmup_steps=0, schedule="constant")
STEP = StepConfig(compute_dtype="float32", remat="none")
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ALL, "alpha_pattern": {"q_proj": 3}},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "rank_pattern": {"down_proj": 2}},
    "dora": {"target_modules": ALL, "use_dora": True},
}


def in_torch(params: Params, config: Any, folder: Path, **settings: Any) -> Any:
    """The same model in PyTorch under an adapter of PEFT with random factors, saved to folder / "adapter"."""
    save_hf(ParamsCheckpoint(params, config), folder / "model", progress=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False} | settings
    model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    model.save_pretrained(folder / "adapter")
    return model


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config: Any, params: Params, tokens: jax.Array) -> jax.Array:
    return unembed(config, params, forward(config, params, Inputs.training(tokens)).hidden)


def logits(params: Params, config: Any, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(logits_of(config, params, jnp.asarray(tokens, jnp.int32)))


def theirs(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def close(found: Any, wanted: Any, limit: float) -> None:
    assert np.linalg.norm(found - wanted) <= limit * np.linalg.norm(wanted)


TOKENS = np.random.default_rng(0).integers(0, 64, (4, 33))


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        ("lora", "dense"),
        pytest.param("rslora", "dense", marks=pytest.mark.slow),
        pytest.param("dora", "int8, layers apart", marks=pytest.mark.slow),
    ],
)
def test_losses_and_folders_are_peft_s(kind: str, base: str, tmp_path: Path) -> None:
    params = parameters(TIED)
    if base != "dense":
        mlp = params["layers"]["mlp"]
        mlp["gate"]["kernel"] = Int8.quantise(mlp["gate"]["kernel"])
        params = unstack(params)
    model = in_torch(params, TIED, tmp_path, **KINDS[kind])
    over = apply_adapter(params, read_adapter(tmp_path / "adapter", TIED))
    before = logits(params, TIED, TOKENS)
    wanted = theirs(model, TOKENS)
    assert np.linalg.norm(before - wanted) > 0.1 * np.linalg.norm(wanted)
    close(logits(over, TIED, TOKENS), wanted, 1e-5)

    state, frozen = start(over, OPTIMIZER)
    trainable = jax.tree_util.tree_leaves_with_path(state.trainable)
    assert {path[-1].name for path, _ in trainable} <= {"a", "b", "magnitude"}
    step = jax.jit(make_train_step(TIED, Pretrain(), OPTIMIZER, STEP, 8), donate_argnums=0)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
    )
    model.train()
    for _ in range(8):
        state, metrics = step(state, frozen, full_batch(TOKENS))
        tokens = torch.tensor(TOKENS)
        loss = torch.nn.functional.cross_entropy(
            model(tokens[:, :-1]).logits.reshape(-1, 64), tokens[:, 1:].reshape(-1)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert abs(float(metrics["loss"]) - loss.item()) <= 1e-5
    model.eval()
    after = theirs(model, TOKENS)
    assert np.linalg.norm(after - wanted) > 0.01 * np.linalg.norm(wanted)

    # out again: PEFT reads ours over the same base, and merging is one sum
    trained = merge_frozen(state.trainable, frozen)["policy"]
    adapter = adapter_of(TIED, trained)
    save_adapter(adapter, TIED, tmp_path / "ours", base=str(tmp_path / "model"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    close(theirs(peft.PeftModel.from_pretrained(again, tmp_path / "ours"), TOKENS), logits(trained, TIED, TOKENS), 1e-5)
    merged = MergedCheckpoint(open_checkpoint(tmp_path / "model"), adapter)
    close(logits(load_params(merged, progress=False), TIED, TOKENS), logits(trained, TIED, TOKENS), 1e-5)
    read = read_adapter(tmp_path / "ours", TIED)
    for path, low in adapter.items():
        close(read[path].b * read[path].scaling, low.b * low.scaling, 1e-6)


def test_layers_of_different_ranks_and_scalings(tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"layers.1.*q_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 5}}
    params, targets = parameters(TIED), ["q_proj", "up_proj"]
    model = in_torch(params, TIED, tmp_path, target_modules=targets, layers_to_transform=[1], **patterns)
    adapter = read_adapter(tmp_path / "adapter", TIED)
    close(logits(apply_adapter(params, adapter), TIED, TOKENS), theirs(model, TOKENS), 1e-5)
    model = in_torch(params, TIED, tmp_path / "all", target_modules=targets, use_rslora=True, **patterns)
    over = apply_adapter(params, read_adapter(tmp_path / "all" / "adapter", TIED))
    close(logits(over, TIED, TOKENS), theirs(model, TOKENS), 1e-5)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_tables_of_their_own(tmp_path: Path) -> None:
    """PEFT's names for an embedding have its two factors the other way round."""
    params = parameters(CONFIG)
    model = in_torch(params, CONFIG, tmp_path, target_modules=["embed_tokens", "lm_head"])
    adapter = read_adapter(tmp_path / "adapter", CONFIG)
    close(logits(apply_adapter(params, adapter), CONFIG, TOKENS), theirs(model, TOKENS), 1e-5)
    save_adapter(adapter, CONFIG, tmp_path / "ours", base="x")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    close(theirs(peft.PeftModel.from_pretrained(again, tmp_path / "ours"), TOKENS), theirs(model, TOKENS), 1e-5)
    with pytest.raises(InputError, match="embedding and head are one table"):
        read_adapter(tmp_path / "adapter", TIED)
    with pytest.raises(InputError, match="embedding and head are one table"):
        adapted(AdapterConfig(rank=2, targets=("lm_head",)), TIED, {}, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\] is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not supported"),
        ({"task_type": "SEQ_CLS"}, "task_type = 'SEQ_CLS' is not supported"),
        ({"something_new": 3}, "unknown key 'something_new' = 3"),
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA' is not supported"),
    ],
)
def test_what_an_adapter_may_not_ask_for(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    in_torch(parameters(TIED), TIED, tmp_path, target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(InputError, match=words):
        read_adapter(tmp_path / "adapter", TIED)


def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    in_torch(parameters(TIED), TIED, tmp_path, target_modules=["q_proj"])
    with pytest.raises(InputError, match="the adapter is of another model"):
        read_adapter(tmp_path / "adapter", dataclasses.replace(TIED, head_dim=4))
    with pytest.raises(InputError, match="which is no matrix of this qwen2"):
        read_adapter(tmp_path / "adapter", dataclasses.replace(TIED, num_layers=1))


@pytest.mark.parametrize("dora", [False, True])
def test_a_new_adapter_changes_nothing(dora: bool) -> None:
    params = parameters(TIED)
    fresh = adapted(AdapterConfig(rank=4, dora=dora), TIED, params, 0)
    assert len(dict(flatten(fresh))) == len(dict(flatten(params)))
    close(logits(fresh, TIED, TOKENS), logits(params, TIED, TOKENS), 1e-6)
    a = np.asarray(get_leaf(fresh, "layers/attention/o/kernel").a)
    assert a.shape == (2, 4, 4, 8) and 0.9 < np.abs(a).max() * np.sqrt(32) <= 1
    stacked = restacked(unstack(params))
    assert all(np.array_equal(leaf, get_leaf(params, path)) for path, leaf in flatten(stacked))
    with pytest.raises(InputError, match="targets has 'w1', which this model lacks; known: down_proj, "):
        adapted(AdapterConfig(rank=4, targets=("w1",)), TIED, params, 0)


@pytest.mark.slow
def test_a_run_stopped_and_gone_on_with(tmp_path: Path) -> None:
    """OUT/final is what PEFT reads, checkpoints hold the adapter alone, and a second start goes on."""
    experiment = make_run(tmp_path)
    options = ["--adapter.rank", "4", "--adapter.targets", "q_proj", "down_proj", "--export", str(tmp_path / "hf")]
    status, said = run(experiment, *options, "--steps", "6")
    assert status == 0, said
    held = [file for file in (tmp_path / "out" / "checkpoints" / "6").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in held) < 0.6 * (tmp_path / "model" / "model.safetensors").stat().st_size
    status, said = run(experiment, *options, "--steps", "9")
    assert status == 0 and "going on from the checkpoint of step 6" in said, said
    assert run(experiment, *options[:1], "5", *options[2:], "--steps", "9")[0] == 2  # another adapter, another run

    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    before = theirs(base, TOKENS)
    adapted = theirs(peft.PeftModel.from_pretrained(base, tmp_path / "out" / "final"), TOKENS)
    assert np.linalg.norm(adapted - before) > 1e-3 * np.linalg.norm(before)
    merged = load_params(open_checkpoint(tmp_path / "hf"), np.float32, progress=False)
    close(logits(merged, MODEL, TOKENS), adapted, 1e-2)  # bfloat16


@pytest.mark.slow
def test_losses_of_the_default_model_are_peft_s(default_gguf: Path, tmp_path: Path) -> None:
    """Fifty steps of English at a learning rate at which the loss falls by a tenth."""
    checkpoint = open_checkpoint(default_gguf)
    config = checkpoint.config
    text = corpus_file("english", "train").read_text(encoding="utf-8")[:30_000]
    ids = checkpoint.tokenizer().encode(text)[: 50 * 2 * 33]
    batches = np.reshape(ids, (50, 2, 33))
    params = load_params(checkpoint, np.float32, dequantise=True, progress=False)
    settings = {"r": 8, "lora_alpha": 16, "init_lora_weights": True, "target_modules": ALL}
    model = in_torch(params, config, tmp_path, **settings)
    state, frozen = start(apply_adapter(params, read_adapter(tmp_path / "adapter", config)), OPTIMIZER)
    rate = dataclasses.replace(OPTIMIZER, learning_rate=2e-4)
    step = jax.jit(make_train_step(config, Pretrain(), rate, STEP, 50), donate_argnums=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    model.train()
    ours, theirs = [], []
    for batch in batches:
        state, metrics = step(state, frozen, full_batch(batch))
        ours.append(float(metrics["loss"]))
        tokens = torch.tensor(batch)
        scores = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(scores.reshape(-1, scores.shape[-1]), tokens[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(loss.item())
    print(np.abs(np.subtract(ours, theirs)).max(), np.mean(ours[:5]), np.mean(ours[-5:]))
    assert np.abs(np.subtract(ours, theirs)).max() <= 1e-4
