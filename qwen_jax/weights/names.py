"""One table: what each leaf of the parameter tree is called in Hugging Face's files and in GGUF.

Every projection keeps the [out, in] layout of PyTorch, so a leaf differs from the file's tensors only by reshapes:
layers (and experts) stacked in front, `out` or `in` split into heads.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Literal

from qwen_jax.config import ModelConfig

Style = Literal["hf", "gguf"]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of the parameter tree, and the file tensors that it is cut into, one per index of its leading axes."""

    path: str  # "layers/attention/q/kernel"
    shape: tuple[int, ...]  # in our tree, stacked
    unit: tuple[int, ...]  # the trailing axes of `shape` that one file tensor holds
    row_axes: int  # how many leading axes of `unit` are the tensor's rows
    tensor: str  # name in the file, with one {} per stacked axis
    file_shape: tuple[int, ...]  # of the tensor in the file
    first_row: int = 0  # within the tensor, where several leaves share one

    def indices(self) -> Iterator[tuple[int, ...]]:
        """Every index of the stacked axes: () or (layer,) or (layer, expert)."""
        return itertools.product(*map(range, self.shape[: len(self.shape) - len(self.unit)]))

    @property
    def num_in(self) -> int:
        """How many trailing axes of `unit` are the tensor's columns."""
        return len(self.unit) - self.row_axes

    @property
    def rows(self) -> int:
        return math.prod(self.unit[: self.row_axes])

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The file tensor's shape with everything but the last axis flattened: (rows, in), or (n,) for a vector."""
        if len(self.unit) == self.row_axes:
            return self.file_shape
        columns = math.prod(self.unit[self.row_axes :])
        return (math.prod(self.file_shape) // columns, columns)


def leaves(config: ModelConfig, style: Style) -> list[Leaf]:
    """The parameter tree of `config`, leaf by leaf, named in `style` (Qwen1 has Hugging Face names of its own)."""
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    heads, kv, h = config.num_heads, config.num_kv_heads, config.head_dim
    qwen1 = config.model_type == "qwen"
    out: list[Leaf] = []

    def add(path: str, unit: tuple[int, ...], row_axes: int, hf: str, gguf: str, old: str = "") -> None:
        stacked = path.startswith("layers/")
        name = gguf if style == "gguf" else old if qwen1 else hf
        if stacked:
            name = {"hf": "transformer.h.{}." if qwen1 else "model.layers.{}.", "gguf": "blk.{}."}[style] + name
        rows, columns = math.prod(unit[:row_axes]), unit[row_axes:]
        file_shape = (rows, math.prod(columns)) if columns else (rows,)
        out.append(Leaf(path, (config.num_layers,) * stacked + unit, unit, row_axes, name, file_shape))

    def add_qkv(leaf: str, unit: tuple[int, ...], row_axes: int) -> None:
        for i, (name, n) in enumerate((("q", heads), ("k", kv), ("v", kv))):
            kind = {"kernel": "weight", "bias": "bias"}[leaf]
            gguf = f"attn_qkv.{kind}" if qwen1 else f"attn_{name}.{kind}"
            add(
                f"layers/attention/{name}/{leaf}", (n, *unit), row_axes,
                f"self_attn.{name}_proj.{kind}", gguf, f"attn.c_attn.{kind}",
            )  # fmt: skip
            if qwen1:  # q, k and v are the three thirds of one tensor
                rows = out[-1].file_shape[0]
                fused = (3 * rows, *out[-1].file_shape[1:])
                out[-1] = dataclasses.replace(out[-1], file_shape=fused, first_row=i * rows)

    def add_experts(name: str, unit: tuple[int, ...], hf: str, gguf: str) -> None:
        assert config.moe
        stacked = (config.num_layers, config.moe.num_experts, *unit)
        if style == "hf":
            leaf = Leaf(name, stacked, unit, 1, f"model.layers.{{}}.mlp.experts.{{}}.{hf}", unit)
        else:
            leaf = Leaf(name, stacked, stacked[1:], 2, f"blk.{{}}.{gguf}", stacked[1:])
        out.append(leaf)

    add("embed/embedding", (v, d), 1, "model.embed_tokens.weight", "token_embd.weight", "transformer.wte.weight")
    add("layers/attention_norm/scale", (d,), 1, "input_layernorm.weight", "attn_norm.weight", "ln_1.weight")
    add_qkv("kernel", (h, d), 2)
    if config.qkv_bias:
        add_qkv("bias", (h,), 2)
    if config.qk_norm:
        add("layers/attention/q_norm/scale", (h,), 1, "self_attn.q_norm.weight", "attn_q_norm.weight")
        add("layers/attention/k_norm/scale", (h,), 1, "self_attn.k_norm.weight", "attn_k_norm.weight")
    add(
        "layers/attention/o/kernel", (d, heads, h), 1,
        "self_attn.o_proj.weight", "attn_output.weight", "attn.c_proj.weight",
    )  # fmt: skip
    add("layers/mlp_norm/scale", (d,), 1, "post_attention_layernorm.weight", "ffn_norm.weight", "ln_2.weight")
    if config.moe:
        e, m, s = config.moe.num_experts, config.moe.expert_intermediate_size, config.moe.shared_intermediate_size
        add("layers/moe/router/kernel", (e, d), 1, "mlp.gate.weight", "ffn_gate_inp.weight")
        add_experts("layers/moe/experts/gate", (m, d), "gate_proj.weight", "ffn_gate_exps.weight")
        add_experts("layers/moe/experts/up", (m, d), "up_proj.weight", "ffn_up_exps.weight")
        add_experts("layers/moe/experts/down", (d, m), "down_proj.weight", "ffn_down_exps.weight")
        if s:
            for name, unit in (("gate", (s, d)), ("up", (s, d)), ("down", (d, s))):
                hf = f"mlp.shared_expert.{name}_proj.weight"
                add(f"layers/moe/shared/{name}/kernel", unit, 1, hf, f"ffn_{name}_shexp.weight")
            add(
                "layers/moe/shared_gate/kernel", (1, d), 1,
                "mlp.shared_expert_gate.weight", "ffn_gate_inp_shexp.weight",
            )  # fmt: skip
            if style == "gguf":
                out[-1] = dataclasses.replace(out[-1], file_shape=(d,))
    else:
        add("layers/mlp/gate/kernel", (f, d), 1, "mlp.gate_proj.weight", "ffn_gate.weight", "mlp.w2.weight")
        add("layers/mlp/up/kernel", (f, d), 1, "mlp.up_proj.weight", "ffn_up.weight", "mlp.w1.weight")
        add("layers/mlp/down/kernel", (d, f), 1, "mlp.down_proj.weight", "ffn_down.weight", "mlp.c_proj.weight")
    add("final_norm/scale", (d,), 1, "model.norm.weight", "output_norm.weight", "transformer.ln_f.weight")
    if not config.tie_word_embeddings:
        add("lm_head/embedding", (v, d), 1, "lm_head.weight", "output.weight", "lm_head.weight")
    return out
