"""The PyTorch side of the crosscheck: small random models of every architecture, and what PyTorch computes.

Every Qwen but the first is `transformers`' own class with eager attention on the CPU; Qwen1, which it does not have, is
the module that the tests hold. Torch stays behind this file: it takes and returns NumPy.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_jax.config import DynamicNtkScaling, LinearScaling, ModelConfig, ModelType, MoeConfig, YarnScaling
from qwen_jax.errors import InputError

if TYPE_CHECKING:
    import torch

# Test code, so it is loaded by path in a source checkout and never imported by name.
_QWEN1_SOURCE = Path(__file__).resolve().parent.parent / "tests" / "parity" / "torch_qwen1.py"


# --- Small random models ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Variant:
    """A small architecture; the first layer's key biases are drawn from ±key_bias.

    Released checkpoints have them beyond 100. Only the first layer gets them: in all layers of a random model they make
    attention so sharp that PyTorch in float32 is already 2e-4 from PyTorch in float64.
    """

    config: ModelConfig
    key_bias: float = 1.0


def variants(model_type: ModelType) -> dict[str, Variant]:
    """The small models of one architecture, by what each is there to exercise."""
    qwen1, moe = model_type == "qwen", None
    if model_type.endswith("_moe"):
        moe = MoeConfig(8, 2, 32, shared_intermediate_size=48 if model_type == "qwen2_moe" else 0, aux_loss_coef=0.1)
    base = ModelConfig(
        model_type=model_type,
        vocab_size=512,
        hidden_size=64,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4 if qwen1 else 2,
        head_dim=64 if model_type.startswith("qwen3") else 16,
        intermediate_size=96,
        max_position_embeddings=2048,
        rms_norm_eps=1e-3,  # large enough to be missed
        rope_theta=1e4 if qwen1 else 1e6,
        moe=moe,
    )

    def variant(key_bias: float = 1.0, **changes: Any) -> Variant:
        return Variant(dataclasses.replace(base, **changes), key_bias)

    # transformers has windows in every layer of a Qwen3-MoE, or in none
    windows = {"qwen2_moe": (96, None, None, None), "qwen3_moe": (96,) * 4}.get(model_type, (None, None, 96, 96))
    found = {"plain": variant()}
    if not qwen1:
        found |= {
            "tied": variant(tie_word_embeddings=True),
            "yarn": variant(rope_scaling=YarnScaling(4.0, 128), max_position_embeddings=512),
            "window": variant(windows=windows),
        }
    if moe:
        found["norm_topk_prob"] = variant(moe=dataclasses.replace(moe, norm_topk_prob=True))
    if qwen1:
        found["ntk_and_logn"] = variant(rope_scaling=DynamicNtkScaling(100), logn_trained_length=100)
    if model_type == "qwen2":
        found |= {"mha": variant(num_kv_heads=4), "linear_rope": variant(rope_scaling=LinearScaling(4.0))}
    if model_type in ("qwen", "qwen2"):
        found |= {"head_dim_64": variant(hidden_size=256, head_dim=64), "large_key_bias": variant(key_bias=100.0)}
    return found


def write_random(variant: Variant, folder: Path, seed: int = 3) -> None:
    """A checkpoint of random float32 weights, norms and biases too, written by PyTorch's own side.

    With the default seed no router probability is within 5e-6 of its rival on the built-in text: nearer ones would be
    decided by rounding, and then nothing downstream can agree.
    """
    import torch

    config = variant.config.to_hf()
    torch.manual_seed(seed)
    if variant.config.model_type == "qwen":
        model: Any = _qwen1_module().QWenLMHeadModel(config)
    else:
        import transformers

        known = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(config["model_type"], **known), dtype=torch.float32
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
                if name.endswith("layers.0.self_attn.k_proj.bias"):
                    parameter.uniform_(-variant.key_bias, variant.key_bias)
                elif name.endswith("h.0.attn.c_attn.bias"):
                    parameter.chunk(3)[1].uniform_(-variant.key_bias, variant.key_bias)
            elif parameter.ndim == 1:  # norms
                parameter.normal_(mean=1.0, std=0.3)
            else:
                parameter.normal_(std=1.5 / math.sqrt(parameter.shape[-1]))
    if variant.config.model_type == "qwen":
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    else:
        model.save_pretrained(folder)


# --- Models -----------------------------------------------------------------------------------------------------------


def load(path: Path) -> torch.nn.Module:
    """The float32 model of a checkpoint folder or GGUF file, its weights read by PyTorch's own side.

    Raises InputError where that side cannot read it.
    """
    import torch

    if path.is_dir() and json.loads((path / "config.json").read_text()).get("model_type") == "qwen":
        return _load_qwen1(path)
    import transformers

    folder, kind = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            local_files_only=True,
            **kind,
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"transformers cannot load {path}, so there is nothing to compare with: {error}") from None
    return model.eval()


def _qwen1_module() -> ModuleType:
    if not _QWEN1_SOURCE.exists():
        raise InputError("the PyTorch reference of Qwen1 is part of the tests; run this from a source checkout.")
    spec = importlib.util.spec_from_file_location("torch_qwen1", _QWEN1_SOURCE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _load_qwen1(folder: Path) -> torch.nn.Module:
    from safetensors.torch import load_file

    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise InputError(f"{folder} has no .safetensors file; convert the checkpoint to safetensors first.")
    model = _qwen1_module().QWenLMHeadModel(json.loads((folder / "config.json").read_text()))
    model.load_state_dict({name: tensor for shard in shards for name, tensor in load_file(shard).items()})
    return model.float().eval()


def to_bfloat16(model: torch.nn.Module) -> None:
    """Casts the weights in place. Buffers stay float32, as when `transformers` loads a bfloat16 checkpoint."""
    import torch

    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


# --- What is compared -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Trace:
    """float32 values of one forward pass: layers [L + 1, B, T, D] (the embedding first), hidden [B, T, D] after the
    final norm, logits [B, T, V]."""

    layers: np.ndarray
    hidden: np.ndarray
    logits: np.ndarray


def trace(model: torch.nn.Module, tokens: np.ndarray, mask: np.ndarray | None = None) -> Trace:
    """Runs tokens [B, T] with an attention mask [B, T] (1 at tokens, 0 at padding; default all tokens)."""
    import torch

    base: Any = getattr(model, "transformer", None) or model.model
    watched = [getattr(base, "wte", None) or base.embed_tokens, *(getattr(base, "h", None) or base.layers)]
    watched.append(getattr(base, "ln_f", None) or base.norm)
    outputs: list[np.ndarray] = []

    def record(module: Any, arguments: Any, output: Any) -> None:
        outputs.append(_numpy(output[0] if isinstance(output, tuple) else output))

    hooks = [module.register_forward_hook(record) for module in watched]
    kwargs: dict[str, Any] = {}
    if mask is not None:
        kwargs["attention_mask"] = torch.tensor(mask)
        if hasattr(model, "generate"):  # transformers numbers positions from the mask only when it generates
            kwargs["position_ids"] = (kwargs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = _numpy(model(torch.tensor(tokens, dtype=torch.long), **kwargs).logits)
    for hook in hooks:
        hook.remove()
    return Trace(np.stack(outputs[:-1]), outputs[-1], logits)


def loss_and_gradients(model: torch.nn.Module, tokens: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    """The training loss of tokens [B, T] (with the load-balancing term of a mixture of experts), and its gradient by
    the names that the tensors have in a checkpoint.

    The cross-entropy alone is in float64: over 151,936 logits PyTorch's float32 sum on the CPU is off by 3e-5.
    """
    import torch

    model.train()  # the parts of Qwen1 that act at inference only are off; there is no dropout
    ids = torch.tensor(tokens, dtype=torch.long)
    out = model(ids, **({"output_router_logits": True} if hasattr(model, "router_aux_loss_coef") else {}))
    loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())
    if hasattr(model, "router_aux_loss_coef"):
        loss = loss + model.router_aux_loss_coef * out.aux_loss
    loss.backward()
    gradients = dict(_checkpoint_tensors({name: p.grad for name, p in model.named_parameters()}))
    model.zero_grad()
    model.eval()
    return loss.item(), gradients


def _checkpoint_tensors(tensors: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """In memory transformers keeps the experts of a layer as one tensor; checkpoints keep every expert's own."""
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            for i, expert in enumerate(tensor):
                prefix = f"{name.removesuffix('gate_up_proj')}{i}"
                gate, up = expert.chunk(2)
                yield f"{prefix}.gate_proj.weight", _numpy(gate)
                yield f"{prefix}.up_proj.weight", _numpy(up)
        elif name.endswith("experts.down_proj"):
            for i, expert in enumerate(tensor):
                yield f"{name.removesuffix('down_proj')}{i}.down_proj.weight", _numpy(expert)
        else:
            yield name, _numpy(tensor)


def greedy(model: torch.nn.Module, prompts: np.ndarray, num_tokens: int) -> np.ndarray:
    """[B, num_tokens]: the likeliest token again and again after prompts [B, P], with PyTorch's own cache."""
    import torch

    tokens, cache, chosen = torch.tensor(prompts, dtype=torch.long), None, []
    with torch.no_grad():
        for _ in range(num_tokens):
            # The cache goes in and out by place: transformers 5.24 renamed it from past_key_values.
            logits, cache = model(tokens, None, None, cache, use_cache=True)[:2]
            tokens = logits[:, -1:].argmax(-1)
            chosen.append(tokens)
    return torch.cat(chosen, dim=1).numpy()


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().numpy()
