"""Kernels beside cuDNN and PyTorch: attention forward and backward, one query over a cache, weights of few bits."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from bench.gpu import measure
from bench.gpu.measure import attempt, bandwidth, record, seconds, torch_wait
from qwen_jax.kernels import decode_gpu, flash_gpu
from qwen_jax.kernels.flash_gpu import Blocks, Plan

# query heads, key/value heads, width: Qwen2.5-0.5B's and 7B's
HEADS = ((14, 2, 64), (28, 4, 128))


def device() -> None:
    """Versions, and the two ceilings: bytes copied and bfloat16 products per second."""
    import torch

    kind = jax.devices()[0].device_kind
    record(device=kind, jax=jax.__version__, torch=torch.__version__)
    record(what="copy, GB/s", jax=bandwidth() / 1e9)
    size = 256 if measure.rehearsing else 8192
    x, y = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    product = jax.jit(jnp.matmul)
    record(what="bfloat16 product, TFLOP/s", jax=2 * size**3 / seconds(lambda: product(x, y)) / 1e12)
    a = torch.randn(size, size, device=_torch_device(), dtype=torch.bfloat16)
    record(what="bfloat16 product, TFLOP/s", torch=2 * size**3 / seconds(lambda: a @ a, torch_wait) / 1e12)


def checks() -> None:
    """Values and gradients of the kernels against PyTorch's float64, by the tests' own check."""
    from tests.kernels import test_flash_gpu as tests

    cases, plan = tests.LARGE, None
    cases = [*cases, tests.Case(1, 4096, (28, 4), 128, "bfloat16"), tests.Case(1, 1500, (14, 2), 64, "float32")]
    if measure.rehearsing:
        cases, plan = tests.CASES[:1], tests.SMALL
    for case in cases:

        def run(case: Any = case) -> dict[str, Any]:
            function = tests.make(case, plan, measure.rehearsing)
            try:
                tests.check(function, case, [case.keys - case.queries] * case.batch, 700, 0)
            except AssertionError as error:
                return {"holds": False, "why": str(error)[:200]}
            return {"holds": True}

        attempt(run, kernel="flash", case=_described(case))
    from tests.kernels import test_decode_attention as decode_tests

    for case in decode_tests.GPU:

        def run_decode(case: Any = case) -> dict[str, Any]:
            try:
                decode_tests.check_on_gpu(case, interpret=measure.rehearsing)
            except AssertionError as error:
                return {"holds": False, "why": str(error)[:200]}
            return {"holds": True}

        attempt(run_decode, kernel="decode", case=_described(case))


def _described(case: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in case._asdict().items() if value not in (None, False))


def attention() -> None:
    """Causal attention of 32,768 tokens in rows of several lengths, forward, and forward with backward."""
    lengths, tokens = ((2048, 8192, 32768), 32768) if not measure.rehearsing else ((64,), 64)
    for (heads, kv_heads, width), length in itertools.product(HEADS, lengths):
        batch = tokens // length
        # two products, each of half the square
        flops = 2 * batch * heads * length**2 * width
        names = {"heads": f"{heads}/{kv_heads} of {width}", "length": length}
        q, k, v = _arrays(batch, length, length, heads, kv_heads, width)
        sides: dict[str, Callable[..., Any]] = {"ours": functools.partial(_ours)}
        if not measure.rehearsing:
            sides["cuDNN"] = _cudnn
        for side, attend in sides.items():
            attempt(lambda attend=attend: _both_ways(attend, q, k, v, flops), **names, side=side)
        attempt(lambda: _torch_both_ways(batch, length, heads, kv_heads, width, flops), **names, side="torch SDPA")
    # Dual Chunk Attention: queries turned in three ways, of which each key needs one
    (heads, kv_heads, width), length = HEADS[1], lengths[-1]
    q, k, v = _arrays(1, length, length, heads, kv_heads, width)
    names = {"heads": f"{heads}/{kv_heads} of {width}", "length": length}
    dual = functools.partial(_ours, chunk_length=length // 4)
    q = jnp.stack([q, q, q])
    attempt(lambda: _both_ways(dual, q, k, v, 2 * heads * length**2 * width), **names, side="ours, DCA")


def decode_attention() -> None:
    """One query a sequence over a full cache, as a share of what a copy reaches in bytes per second."""
    ceiling = bandwidth()
    shapes = list(itertools.product((1, 8, 64), (4096, 32768))) if not measure.rehearsing else [(2, 64)]
    for (heads, kv_heads, width), (batch, length) in itertools.product(HEADS, shapes):
        names = {"heads": f"{heads}/{kv_heads} of {width}", "sequences": batch, "keys": length}
        q, k, v = _arrays(batch, 1, length, heads, kv_heads, width)
        cache_bytes = 2 * k.nbytes
        sides: dict[str, Callable[..., Any]] = {"ours": _ours_decoding, "plain": _plain_decoding}
        for side, attend in sides.items():

            def run(attend: Callable[..., Any] = attend) -> dict[str, Any]:
                compiled = jax.jit(attend)
                taken = seconds(lambda: compiled(q, k, v))
                return {"microseconds": taken * 1e6, "of copy's bytes/s": cache_bytes / taken / ceiling}

            attempt(run, **names, side=side)

        def run_torch() -> dict[str, Any]:
            import torch

            a, b, c = _torch_arrays(batch, 1, length, heads, kv_heads, width)
            attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=True)
            with torch.inference_mode():
                taken = seconds(lambda: attend(a, b, c), torch_wait)
            return {"microseconds": taken * 1e6, "of copy's bytes/s": cache_bytes / taken / ceiling}

        attempt(run_torch, **names, side="torch SDPA")


def products() -> None:
    """x @ W^T of 7B's MLP with W in bfloat16, int8 and int4 widened within the product, at 1, 8 and 64 rows."""
    ceiling = bandwidth()
    size_out, size_in = (18944, 3584) if not measure.rehearsing else (128, 64)
    weights = [jax.random.normal(jax.random.key(i), (size_out, size_in), jnp.bfloat16) for i in range(4)]
    few_bits = {
        "bfloat16": (weights, 2.0),
        "int8": ([(w * 30).astype(jnp.int8) for w in weights], 1.0),
        "int4": ([(w * 2).astype(jnp.int4) for w in weights], 0.5),
    }
    scale = jnp.ones(size_out, jnp.float32)
    for rows, (name, (ws, width)) in itertools.product((1, 8, 64), few_bits.items()):
        x = jax.random.normal(jax.random.key(9), (rows, size_in), jnp.bfloat16)

        @jax.jit
        def multiply(x: Any, ws: Any) -> Any:
            def one(w: Any) -> Any:
                y = jnp.einsum("bi,oi->bo", x, w.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
                return (y * scale).astype(jnp.bfloat16)

            return [one(w) for w in ws]

        def run(multiply: Any = multiply, x: Any = x, ws: Any = ws, width: float = width) -> dict[str, Any]:
            taken = seconds(lambda: multiply(x, ws)) / len(ws)
            moved = size_out * size_in * width
            return {"microseconds": taken * 1e6, "of copy's bytes/s": moved / taken / ceiling}

        attempt(run, weight=name, rows=rows)


def tiles() -> None:
    """Looks for better blocks of each of the three kernels at 8,192 tokens, and prints the fastest first."""
    length, batch = (8192, 4) if not measure.rehearsing else (64, 1)
    sizes = [(q, k, w, s) for q in (64, 128) for k in (32, 64, 128) for w in (4, 8) for s in (2, 3)]
    turned = [(q, k, w, s) for q in (32, 64) for k in (64, 128) for w in (4, 8) for s in (1, 2, 3)]
    if measure.rehearsing:
        sizes = turned = [(16, 16, 4, 1)]
    for heads, kv_heads, width in HEADS:
        q, k, v = _arrays(batch, length, length, heads, kv_heads, width)
        scalars = jnp.zeros((batch, 2), jnp.int32)
        lse, delta = (jnp.ones((batch, heads, length), jnp.float32) for _ in range(2))
        names = {"forward": sizes, "d_query": sizes, "d_key": turned}

        def program(kernel: str, blocks: tuple[int, ...]) -> Any:
            plan = Plan(*[Blocks(*blocks)] * 3)
            static = flash_gpu._Static(False, None, False, plan, measure.rehearsing)
            if kernel == "forward":
                return jax.jit(lambda q, k, v: flash_gpu._forward(static, q[None], k, v, scalars, None))
            function = flash_gpu._d_query if kernel == "d_query" else flash_gpu._d_key
            return jax.jit(lambda q, k, v: function(static, q[None], k, v, scalars, None, q, lse, delta))

        def build(item: tuple[str, tuple[int, ...]]) -> Any:
            try:
                return program(*item).lower(q, k, v).compile()
            except Exception as error:  # blocks that the compiler refuses
                return error

        items = [(kernel, blocks) for kernel, options in names.items() for blocks in options]
        with ThreadPoolExecutor() as pool:
            built = list(pool.map(build, items))
        found = []
        for (kernel, blocks), compiled in zip(items, built, strict=True):
            if isinstance(compiled, Exception):
                continue
            found.append((kernel, seconds(lambda compiled=compiled: compiled(q, k, v)) * 1e3, blocks))
        for kernel in names:
            for _, taken, blocks in sorted(row for row in found if row[0] == kernel)[:8]:
                record(width=width, kernel=kernel, blocks=list(blocks), ms=taken)


# --- the sides --------------------------------------------------------------------------------------------------------


def _arrays(batch: int, queries: int, keys: int, heads: int, kv_heads: int, width: int) -> list[jax.Array]:
    """q [B, T, H, h], k and v [B, K, S, h], bfloat16."""
    shapes = ((batch, queries, heads, width), (batch, kv_heads, keys, width), (batch, kv_heads, keys, width))
    return [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes)]


def _ours(q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array:
    return flash_gpu.flash_attention(q, k, v, interpret=measure.rehearsing, **options)


def _ours_decoding(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    lengths = jnp.full(k.shape[0], k.shape[2], jnp.int32)
    return decode_gpu.decode_attention(q[:, 0], k, v, lengths, interpret=measure.rehearsing)[0]


def _plain_decoding(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The formula, as XLA compiles it."""
    queries = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
    scores = jnp.einsum("bkgh,bksh->bkgs", queries, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return jnp.einsum("bkgs,bksh->bkgh", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    k, v = (jnp.swapaxes(x, 1, 2) for x in (k, v))
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def _both_ways(attend: Callable[..., Any], q: jax.Array, k: jax.Array, v: jax.Array, flops: float) -> dict[str, Any]:
    def pull(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        out, pullback = jax.vjp(attend, q, k, v)
        return out, pullback(out)

    forward, both = jax.jit(attend), jax.jit(pull)
    return _times(seconds(lambda: forward(q, k, v)), seconds(lambda: both(q, k, v)), flops)


def _times(forward: float, both: float, flops: float) -> dict[str, Any]:
    return {
        "forward ms": forward * 1e3,
        "TFLOP/s": flops / forward / 1e12,
        "forward and backward ms": both * 1e3,
        "TFLOP/s of both": 3.5 * flops / both / 1e12,  # the backward pass multiplies five times, the forward twice
    }


def _torch_device() -> str:
    return "cpu" if measure.rehearsing else "cuda"


def _torch_arrays(batch: int, queries: int, keys: int, heads: int, kv_heads: int, width: int) -> list[Any]:
    import torch

    shapes = ((batch, heads, queries, width), (batch, kv_heads, keys, width), (batch, kv_heads, keys, width))
    return [torch.randn(shape, device=_torch_device(), dtype=torch.bfloat16) for shape in shapes]


def _torch_both_ways(batch: int, length: int, heads: int, kv_heads: int, width: int, flops: float) -> dict[str, Any]:
    import torch

    q, k, v = (x.requires_grad_() for x in _torch_arrays(batch, length, length, heads, kv_heads, width))
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    d_out = torch.randn_like(q)

    def forward() -> Any:
        with torch.inference_mode():
            return attend(q, k, v)

    def both() -> Any:
        return torch.autograd.grad(attend(q, k, v), (q, k, v), d_out)

    return _times(seconds(forward, torch_wait), seconds(both, torch_wait), flops)
