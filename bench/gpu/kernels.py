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
    """Values and gradients of the kernels against PyTorch's and NumPy's float64, by the tests' own checks."""
    from tests.kernels import test_decode_attention as decode_tests
    from tests.kernels import test_flash_gpu as flash_tests

    cases, plan = flash_tests.LARGE, None
    if measure.rehearsing:
        cases, plan = flash_tests.CASES[:1], flash_tests.SMALL
    for case in cases:
        function = flash_tests.make(case, plan, measure.rehearsing)
        offset = [case.keys - case.queries] * case.batch
        check = functools.partial(flash_tests.check, function, case, offset, 700, 0)
        attempt(functools.partial(_holds, check), kernel="flash", case=_described(case))
    for case in decode_tests.GPU[: 1 if measure.rehearsing else None]:
        check = functools.partial(decode_tests.check_on_gpu, case, interpret=measure.rehearsing)
        attempt(functools.partial(_holds, check), kernel="decode", case=_described(case))


def _holds(check: Callable[[], None]) -> dict[str, Any]:
    try:
        check()
    except AssertionError as error:
        return {"holds": False, "why": str(error)[:200]}
    return {"holds": True}


def _described(case: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in case._asdict().items() if value not in (None, False))


def attention() -> None:
    """Causal attention of 32,768 tokens in rows of several lengths, forward, and forward with backward."""
    lengths, tokens = ((2048, 8192, 32768), 32768) if not measure.rehearsing else ((32,), 32)
    for (heads, kv_heads, width), length in itertools.product(HEADS, lengths):
        shape = tokens // length, length, length, heads, kv_heads, width
        names = {"heads": f"{heads}/{kv_heads} of {width}", "length": length}
        attempt(functools.partial(_both_ways, _ours, *shape), **names, side="ours")
        if not measure.rehearsing:
            attempt(functools.partial(_both_ways, _cudnn, *shape), **names, side="cuDNN")
        attempt(functools.partial(_torch_both_ways, *shape), **names, side="torch SDPA")
        if length == lengths[-1]:
            attempt(functools.partial(_both_ways, _dual_chunk, *shape), **names, side="ours, DCA")


def decode_attention() -> None:
    """One query a sequence over a full cache, as a share of what a copy reaches in bytes per second."""
    ceiling = bandwidth()
    shapes = list(itertools.product((1, 8, 64), (4096, 32768))) if not measure.rehearsing else [(2, 64)]
    for (heads, kv_heads, width), (batch, length) in itertools.product(HEADS, shapes):
        names = {"heads": f"{heads}/{kv_heads} of {width}", "sequences": batch, "keys": length}
        shape = batch, 1, length, heads, kv_heads, width
        for side, attend in {"ours": _ours_decoding, "plain": _plain_decoding}.items():
            attempt(functools.partial(_decoding, attend, ceiling, *shape), **names, side=side)
        attempt(functools.partial(_torch_decoding, ceiling, *shape), **names, side="torch SDPA")


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
    for rows, (name, (ws, weight_bytes)) in itertools.product((1, 8, 64), few_bits.items()):
        x = jax.random.normal(jax.random.key(9), (rows, size_in), jnp.bfloat16)
        attempt(functools.partial(_product, x, ws, weight_bytes, ceiling), weight=name, rows=rows)


def _product(x: jax.Array, ws: list[jax.Array], weight_bytes: float, ceiling: float) -> dict[str, Any]:
    scale = jnp.ones((1, ws[0].shape[0]), jnp.float32)

    @jax.jit
    def multiply(x: jax.Array, ws: list[jax.Array]) -> list[jax.Array]:
        def one(w: jax.Array) -> jax.Array:
            y = jnp.einsum("bi,oi->bo", x, w.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
            return (y * scale).astype(jnp.bfloat16)

        return [one(w) for w in ws]

    # several weights in turn, so that none is read from the cache
    taken = seconds(lambda: multiply(x, ws)) / len(ws)
    return {"microseconds": taken * 1e6, "of copy's bytes/s": ws[0].size * weight_bytes / taken / ceiling}


def tiles() -> None:
    """Looks for better blocks of each of the three kernels at 8,192 tokens, and prints the fastest first."""
    length, batch = (8192, 4) if not measure.rehearsing else (32, 1)
    sizes = [(q, k, w, s) for q in (64, 128) for k in (32, 64, 128) for w in (4, 8) for s in (2, 3)]
    turned = [(q, k, w, s) for q in (32, 64) for k in (64, 128) for w in (4, 8) for s in (1, 2, 3)]
    if measure.rehearsing:
        sizes = turned = [(16, 16, 4, 1)]
    for heads, kv_heads, width in HEADS:
        arrays = _arrays(batch, length, length, heads, kv_heads, width)
        for kernel, options in {"forward": sizes, "d_query": sizes, "d_key": turned}.items():
            with ThreadPoolExecutor() as pool:
                compiled = list(pool.map(functools.partial(_tile, kernel, arrays), options))
            fits = [(run, blocks) for run, blocks in zip(compiled, options, strict=True) if run]
            found = sorted((seconds(functools.partial(run, *arrays)) * 1e3, blocks) for run, blocks in fits)
            for milliseconds, blocks in found[:8]:
                record(width=width, kernel=kernel, blocks=list(blocks), ms=milliseconds)


def _tile(kernel: str, arrays: list[jax.Array], blocks: tuple[int, int, int, int]) -> Any:
    """One of the kernels compiled with these blocks; None where the compiler refuses them."""
    q, k, v = arrays
    static = flash_gpu._Static(False, None, False, Plan(*[Blocks(*blocks)] * 3), measure.rehearsing)
    scalars, row = jnp.zeros((q.shape[0], 2), jnp.int32), jnp.ones((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        if kernel == "forward":
            return flash_gpu._forward(static, q[None], k, v, scalars, None)
        function = flash_gpu._d_query if kernel == "d_query" else flash_gpu._d_key
        return function(static, q[None], k, v, scalars, None, q, row, row)

    try:
        return jax.jit(run).lower(q, k, v).compile()
    except Exception:  # of many kinds: registers, shared memory, the layout of a product
        return None


# --- the sides --------------------------------------------------------------------------------------------------------


def _arrays(batch: int, queries: int, keys: int, heads: int, kv_heads: int, width: int) -> list[jax.Array]:
    """q [B, T, H, h], k and v [B, K, S, h], bfloat16."""
    shapes = ((batch, queries, heads, width), (batch, kv_heads, keys, width), (batch, kv_heads, keys, width))
    return [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes)]


def _ours(q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array:
    return flash_gpu.flash_attention(q, k, v, interpret=measure.rehearsing, **options)


def _dual_chunk(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Queries turned in three ways, of which each key needs one; chunks are a quarter of the row."""
    return _ours(jnp.stack([q, q, q]), k, v, chunk_length=q.shape[1] // 4)


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


def _both_ways(attend: Callable[..., Any], *shape: int) -> dict[str, Any]:
    q, k, v = _arrays(*shape)

    def pull(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        out, pullback = jax.vjp(attend, q, k, v)
        return out, pullback(out)

    forward, both = jax.jit(attend), jax.jit(pull)
    return _times(seconds(lambda: forward(q, k, v)), seconds(lambda: both(q, k, v)), *shape)


def _decoding(attend: Callable[..., Any], ceiling: float, *shape: int) -> dict[str, Any]:
    q, k, v = _arrays(*shape)
    compiled = jax.jit(attend)
    taken = seconds(lambda: compiled(q, k, v))
    return {"microseconds": taken * 1e6, "of copy's bytes/s": 2 * k.nbytes / taken / ceiling}


def _times(
    forward: float, both: float, batch: int, length: int, _: int, heads: int, __: int, width: int
) -> dict[str, Any]:
    flops = 2 * batch * heads * length**2 * width  # two products, each of half the square
    return {
        "forward ms": forward * 1e3,
        "TFLOP/s": flops / forward / 1e12,
        "forward and backward ms": both * 1e3,
        "TFLOP/s of both": 3.5 * flops / both / 1e12,  # the backward pass has five products, the forward two
    }


def _torch_device() -> str:
    return "cpu" if measure.rehearsing else "cuda"


def _torch_arrays(batch: int, queries: int, keys: int, heads: int, kv_heads: int, width: int) -> list[Any]:
    import torch

    shapes = ((batch, heads, queries, width), (batch, kv_heads, keys, width), (batch, kv_heads, keys, width))
    return [torch.randn(shape, device=_torch_device(), dtype=torch.bfloat16) for shape in shapes]


def _torch_both_ways(*shape: int) -> dict[str, Any]:
    import torch

    q, k, v = (x.requires_grad_() for x in _torch_arrays(*shape))
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    d_out = torch.randn_like(q)

    def forward() -> Any:
        with torch.inference_mode():
            return attend(q, k, v)

    def both() -> Any:
        return torch.autograd.grad(attend(q, k, v), (q, k, v), d_out)

    return _times(seconds(forward, torch_wait), seconds(both, torch_wait), *shape)


def _torch_decoding(ceiling: float, *shape: int) -> dict[str, Any]:
    import torch

    q, k, v = _torch_arrays(*shape)
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=True)
    with torch.inference_mode():
        taken = seconds(lambda: attend(q, k, v), torch_wait)
    return {"microseconds": taken * 1e6, "of copy's bytes/s": 2 * k.nbytes / taken / ceiling}
