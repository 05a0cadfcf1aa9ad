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
from qwen_jax.backend import Backend
from qwen_jax.kernels import decode_gpu, flash_gpu, grouped, groups_gpu
from qwen_jax.kernels.flash_gpu import Blocks, Plan
from qwen_jax.leaves import Grouped, Int8, Leaf, matmul

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
    from tests.kernels import test_grouped as grouped_tests
    from tests.kernels import test_groups_gpu as groups_tests

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
    for case in decode_tests.GPU_PAGED[: 1 if measure.rehearsing else None]:
        check = functools.partial(decode_tests.check_paged_on_gpu, case, interpret=measure.rehearsing)
        attempt(functools.partial(_holds, check), kernel="paged decode", case=_described(case))
    for case in groups_tests.CASES + groups_tests.LARGE if not measure.rehearsing else groups_tests.CASES[:1]:
        check = functools.partial(groups_tests.check, case, interpret=measure.rehearsing)
        attempt(functools.partial(_holds, check), kernel="groups", case=_described(case))
    backend = Backend("gpu", interpret=measure.rehearsing)
    names = ("some empty",) if measure.rehearsing else tuple(grouped_tests.GROUPS)
    for name, dtype in itertools.product(names, ("float32", "bfloat16")):
        check = functools.partial(grouped_tests.check, backend, dtype, *grouped_tests.GROUPS[name])
        attempt(functools.partial(_holds, check), kernel="experts", case=f"{name} {dtype}")


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
        for page, dtype in ((16, jnp.bfloat16), (64, jnp.bfloat16), (64, jnp.int8)):
            run = functools.partial(_decoding_pages, page, jnp.dtype(dtype), ceiling, *shape)
            attempt(run, **names, side=f"ours, pages of {page}, {jnp.dtype(dtype).name}")
        attempt(functools.partial(_torch_decoding, ceiling, *shape), **names, side="torch SDPA")


def products() -> None:
    """x @ W^T of 7B's MLP with W in bfloat16 and few bits, at 1, 8 and 64 rows: by our kernel, and as XLA makes it."""
    ceiling = bandwidth()
    size_out, size_in = (18944, 3584) if not measure.rehearsing else (128, 256)
    dense = [0.02 * jax.random.normal(jax.random.key(i), (size_out, size_in), jnp.bfloat16) for i in range(4)]
    kinds = {"bfloat16": dense, "int8": [Int8.quantise(w) for w in dense]}
    kinds |= {f"{name}, 128": [_in_groups(w, name) for w in dense] for name in ("int4", "int8")}
    for rows, (name, weights) in itertools.product((1, 8, 64), kinds.items()):
        x = jax.random.normal(jax.random.key(9), (rows, size_in), jnp.bfloat16)
        for most in (0, groups_gpu.MOST_ROWS) if "," in name else (0,):
            run = functools.partial(_product, x, weights, most, ceiling)
            attempt(run, weight=name, rows=rows, side="ours" if most else "XLA")


def _in_groups(weight: jax.Array, name: str) -> Grouped:
    """Symmetric groups of 128, as GPTQ's."""
    most = 7 if name == "int4" else 127
    groups = weight.astype(jnp.float32).reshape(weight.shape[0], -1, 128)
    scale = jnp.max(jnp.abs(groups), axis=-1) / most
    return Grouped(jnp.round(groups / scale[..., None]).astype(name), scale.astype(jnp.float16))


def _product(x: jax.Array, weights: list[Leaf], most_rows: int, ceiling: float) -> dict[str, Any]:
    before, groups_gpu.MOST_ROWS = groups_gpu.MOST_ROWS, most_rows
    try:
        with Backend("gpu", interpret=measure.rehearsing).entered():
            multiply = jax.jit(lambda x, weights: [matmul(w, x, dtype=x.dtype) for w in weights])
            # several weights in turn, so that none is read from the cache
            compiled = multiply.lower(x, weights).compile()
    finally:
        groups_gpu.MOST_ROWS = before
    taken = seconds(lambda: compiled(x, weights)) / len(weights)
    return {"microseconds": taken * 1e6, "of copy's bytes/s": stored_bytes(weights[0]) / taken / ceiling}


def experts() -> None:
    """One product of Qwen1.5-MoE's experts, forward and both gradients: our kernels, and XLA's ragged_dot_general."""
    num, size_out, size_in = (60, 1408, 2048) if not measure.rehearsing else (4, 32, 32)
    weight = jax.random.normal(jax.random.key(0), (num, size_out, size_in), jnp.bfloat16)
    for tokens in (64, 4096, 16384) if not measure.rehearsing else (4,):
        rows = jax.random.normal(jax.random.key(1), (4 * tokens, size_in), jnp.bfloat16)
        d_out = jax.random.normal(jax.random.key(2), (4 * tokens, size_out), jnp.bfloat16)
        chosen = jax.random.randint(jax.random.key(3), (4 * tokens,), 0, num)
        sizes = jnp.bincount(chosen, length=num)
        for side, kernels in {"ours": "gpu", "XLA": "tpu"}.items():

            def run(kernels: Any = kernels, rows: Any = rows, d_out: Any = d_out, sizes: Any = sizes) -> dict[str, Any]:
                def both(weight: Any, rows: Any, sizes: Any, d_out: Any) -> Any:
                    y, pull = jax.vjp(lambda w, x: grouped.grouped_matmul(w, x, sizes, jnp.bfloat16), weight, rows)
                    return y, pull(d_out)

                with Backend(kernels, interpret=measure.rehearsing).entered():
                    forward = jax.jit(lambda w, x, sizes: grouped.grouped_matmul(w, x, sizes, jnp.bfloat16))
                    forward, both = (
                        forward.lower(weight, rows, sizes).compile(),
                        jax.jit(both).lower(weight, rows, sizes, d_out).compile(),
                    )
                flops = 2 * rows.size * size_out
                taken, whole = (
                    seconds(lambda: forward(weight, rows, sizes)),
                    seconds(lambda: both(weight, rows, sizes, d_out)),
                )
                return {
                    "forward us": taken * 1e6,
                    "TFLOP/s": flops / taken / 1e12,
                    "with gradients us": whole * 1e6,
                    "TFLOP/s of all": 3 * flops / whole / 1e12,
                }

            attempt(run, tokens=tokens, side=side)


def group_tiles() -> None:
    """Looks for better tiles of the product with groups, over two of 7B's shapes, and prints the fastest first."""
    shapes = ((18944, 3584), (3584, 18944)) if not measure.rehearsing else ((128, 256),)
    options = itertools.product((16, 32, 64, 128), (128,), (512, 1024), (4, 8), (3, 4, 5))
    options = list(options) if not measure.rehearsing else [(64, 128, 512, 4, 4)]
    before = _group_tile()
    for (size_out, size_in), rows in itertools.product(shapes, (8, 64)):
        weights = [
            _in_groups(0.02 * jax.random.normal(jax.random.key(i), (size_out, size_in)), "int4") for i in range(4)
        ]
        x = jax.random.normal(jax.random.key(9), (rows, size_in), jnp.bfloat16)

        traced = []
        for tile in options:
            _group_tile(*tile)
            multiply = jax.jit(lambda x, weights: [matmul(w, x, dtype=x.dtype) for w in weights])
            with Backend("gpu", interpret=measure.rehearsing).entered():
                traced.append(multiply.trace(x, weights))
        _group_tile(*before)

        def build(traced: Any) -> Any:
            try:
                return traced.lower().compile()
            except Exception:  # of many kinds: registers, shared memory
                return None

        with ThreadPoolExecutor() as pool:
            built = list(pool.map(build, traced))
        fits = [(run, tile) for run, tile in zip(built, options, strict=True) if run]
        found = sorted((seconds(functools.partial(run, x, weights)) * 1e6 / 4, tile) for run, tile in fits)
        for microseconds, tile in found[:6]:
            record(shape=f"{size_out} x {size_in}", rows=rows, tile=list(tile), microseconds=microseconds)


def _group_tile(*tile: int) -> tuple[int, ...]:
    """Sets the tile if one is given, and returns the one that counts."""
    names = ("FEATURES", "DEPTH", "PROGRAMS", "WARPS", "STAGES")
    for name, value in zip(names, tile, strict=False):
        setattr(groups_gpu, name, value)
    return tuple(getattr(groups_gpu, name) for name in names)


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


def _decoding_pages(page: int, dtype: Any, ceiling: float, *shape: int) -> dict[str, Any]:
    q, k, _ = _arrays(*shape)
    batch, kv_heads, length, width = k.shape
    count = batch * length // page
    order = jax.random.permutation(jax.random.key(5), count).reshape(batch, -1).astype(jnp.int32)
    lengths = jnp.full(batch, length, jnp.int32)
    pages = [jax.random.normal(jax.random.key(i), (kv_heads, count, page, width)) for i in range(2)]
    scales = []
    if dtype == jnp.int8:
        pages, scales = [30 * x for x in pages], [jnp.full((count, kv_heads, page), 1 / 30)] * 2
    pages = [x.astype(dtype) for x in pages]

    @jax.jit
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, *scales: jax.Array) -> jax.Array:
        k_scale, v_scale = scales or (None, None)
        options: Any = {"k_scale": k_scale, "v_scale": v_scale, "interpret": measure.rehearsing}
        return decode_gpu.paged_decode_attention(q[:, 0], k, v, lengths, order, **options)[0]

    taken = seconds(lambda: attend(q, *pages, *scales))
    moved = sum(x.nbytes for x in (*pages, *scales))
    return {"microseconds": taken * 1e6, "of copy's bytes/s": moved / taken / ceiling}


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


def stored_bytes(tree: Any) -> int:
    """Of arrays on a GPU, where two int4 numbers are a byte."""
    return sum(x.nbytes // 2 if x.dtype == jnp.int4 else x.nbytes for x in jax.tree.leaves(tree))


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
