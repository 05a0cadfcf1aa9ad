"""Which implementation of attention is used: a table, of which the first row that fits is taken.

Every row must equal `plain.formula`. The choice is logged under "qwen_jax.attention" when a program is traced, and
`choose` answers for shapes alone, `explain` for a model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.backend import Backend, current_backend
from qwen_jax.config import ModelConfig
from qwen_jax.kernels import cpu, plain
from qwen_jax.kernels.pages import Pages
from qwen_jax.kernels.scaled import Held, Scaled, parts
from qwen_jax.kernels.spec import AttentionSpec

log = logging.getLogger("qwen_jax.attention")


class Case(NamedTuple):
    """Shapes and dtypes q [(3,) B, T, H, h] and k [B, K, S, h], what is seen, and where."""

    q: Any
    k: Any
    spec: AttentionSpec
    backend: Backend

    @property
    def num_queries(self) -> int:
        return self.q.shape[-3]

    @property
    def num_keys(self) -> int:
        return self.k.shape[2]

    @property
    def among_themselves(self) -> bool:
        """Whether the keys are the queries' own tokens, all of them, in causal order."""
        return self.spec.causal and self.spec.from_beginning and self.num_queries == self.num_keys

    @property
    def first_key(self) -> bool:
        """Whether key 0 is known to be the row's first."""
        return isinstance(self.spec.key_start, int) and self.spec.key_start == 0

    @property
    def suits_kernels(self) -> bool:
        """Whether the shapes and what is seen are such as the Pallas kernels take."""
        if not self.spec.causal or self.q.shape[-1] not in (64, 128):
            return False
        if self.spec.chunk_length is None:
            return True
        # the kernels count chunks from their first key, of a row that is one document
        return self.first_key and self.spec.query_chunks is None and self.spec.query_segments is None

    @property
    def suits_decode_kernels(self) -> bool:
        return self.num_queries == 1 and self.suits_kernels and self.first_key and self.spec.query_segments is None


class Row(NamedTuple):
    """One implementation. `run` gives the output and the log-sum-exp, or no such where parts cannot be merged."""

    name: str
    fits: Callable[[Case], bool]
    run: Callable[..., Any]
    merges: bool = True


def _options(spec: AttentionSpec, backend: Backend) -> dict[str, Any]:
    return {"window": spec.window, "chunk_length": spec.chunk_length, "interpret": backend.interpret}


def _flash_options(spec: AttentionSpec, backend: Backend) -> dict[str, Any]:
    return _options(spec, backend) | {
        "query_segments": spec.query_segments if spec.key_segments is not None else None,
        "key_segments": spec.key_segments if spec.query_segments is not None else None,
        "query_offset": spec.start - spec.key_start,
    }


def _tpu_decode(q: jax.Array, k: Held, v: Held, spec: AttentionSpec, backend: Backend) -> tuple[jax.Array, None]:
    from qwen_jax.kernels.decode import decode_attention

    (keys, k_scale), (values, v_scale) = parts(k), parts(v)
    scales: dict[str, Any] = {"k_scale": k_scale, "v_scale": v_scale, "splits": backend.cores}
    options = _options(spec, backend) | scales
    out = decode_attention(q[..., 0, :, :], keys, values, _ends(q, spec), **options)
    return out[:, None], None


def _tpu_flash(q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec, backend: Backend) -> plain.Attended:
    from qwen_jax.kernels.flash import flash_attention_lse

    return flash_attention_lse(q, k, v, **_flash_options(spec, backend))


def _gpu_flash(q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec, backend: Backend) -> plain.Attended:
    from qwen_jax.kernels.flash_gpu import flash_attention_lse

    return flash_attention_lse(q, k, v, **_flash_options(spec, backend))


def _plain(form: Callable[..., plain.Attended]) -> Callable[..., plain.Attended]:
    return lambda q, k, v, spec, backend: form(q, k, v, spec)


def _gpu_decode(q: jax.Array, k: Held, v: Held, spec: AttentionSpec, backend: Backend) -> plain.Attended:
    from qwen_jax.kernels.decode_gpu import decode_attention

    (keys, k_scale), (values, v_scale) = parts(k), parts(v)
    scales: dict[str, Any] = {"k_scale": k_scale, "v_scale": v_scale}
    options = _options(spec, backend) | scales
    out, lse = decode_attention(q[..., 0, :, :], keys, values, _ends(q, spec), **options)
    return out[:, None], lse[:, :, None]


def _native_decode(
    q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec, backend: Backend
) -> tuple[jax.Array, None]:
    rows = jnp.arange(k.shape[0], dtype=jnp.int32)[:, None]
    return _native(q, k, v, rows, spec, by_row=True), None


def _native(
    q: jax.Array, k: jax.Array, v: jax.Array, tables: jax.Array, spec: AttentionSpec, by_row: bool
) -> jax.Array:
    from qwen_jax.kernels import native

    ends = _ends(q, spec)
    begins = jnp.zeros_like(ends) if spec.window is None else ends - jnp.asarray(spec.window, jnp.int32)
    out = native.library().attention(q[:, 0].astype(jnp.float32), k, v, tables, begins, ends, by_row=by_row)
    return out[:, None].astype(q.dtype)


def _fits_native(case: Case) -> bool:
    spec = case.spec
    suits = spec.causal and spec.chunk_length is None and spec.query_segments is None and case.first_key
    over_cache = case.num_queries == 1 and not spec.from_beginning and case.k.dtype == jnp.float32
    return case.backend.native and suits and over_cache and case.q.shape[-1] % 16 == 0


def _fits_tpu_decode(case: Case) -> bool:
    # a block of keys lies in one chunk, and is no longer than all keys
    whole_blocks = (case.spec.chunk_length or 0) % 128 == 0 and case.num_keys >= 128
    return case.backend.kernels == "tpu" and case.suits_decode_kernels and whole_blocks


def _fits_gpu_decode(case: Case) -> bool:
    return case.backend.kernels == "gpu" and case.suits_decode_kernels


def _fits_tpu_flash(case: Case) -> bool:
    # the window of layers in a scan that differ is not known
    return case.backend.kernels == "tpu" and case.suits_kernels and not isinstance(case.spec.window, jax.Array)


ROWS = (
    Row("TPU decode kernel", _fits_tpu_decode, _tpu_decode, merges=False),
    Row("TPU flash kernel", _fits_tpu_flash, _tpu_flash),
    Row("GPU decode kernel", _fits_gpu_decode, _gpu_decode),
    Row("GPU flash kernel", lambda case: case.backend.kernels == "gpu" and case.suits_kernels, _gpu_flash),
    Row("native decode kernel", _fits_native, _native_decode, merges=False),
    Row(
        "one query, keys left",
        lambda case: case.backend.kernels == "cpu" and case.num_queries == 1,
        _plain(cpu.attention_of_one_query),
    ),
    Row(
        "blocks of keys",
        lambda case: 1 < case.num_queries and plain.KEY_BLOCK < case.num_keys and not case.among_themselves,
        _plain(plain.by_key_blocks),
    ),
    Row(
        "causal blocks",
        lambda case: case.among_themselves and case.num_queries <= plain.CAUSAL_BLOCKS * plain.QUERY_BLOCK,
        _plain(plain.by_causal_blocks),
    ),
    Row(
        "blocks of queries",
        lambda case: plain.QUERY_BLOCK < case.num_queries and case.num_queries % plain.QUERY_BLOCK == 0,
        _plain(plain.by_query_blocks),
    ),
    Row("formula", lambda case: True, _plain(plain.formula)),
)


def choose(
    q: Any, k: Any, spec: AttentionSpec, backend: Backend, *, merges: bool = False, rows: tuple[Row, ...] = ROWS
) -> Row:
    """The first row that fits; with `merges`, of those whose results can be merged. Arrays may be shapes alone."""
    case = Case(q, k, spec, backend)
    return next(row for row in rows if (row.merges or not merges) and row.fits(case))


# --- pages ------------------------------------------------------------------------------------------------------------

# Keys of the pages that are gathered at a time where no kernel reads them in place.
PAGED_BLOCK = 256


def _fits_tpu_paged(case: Case) -> bool:
    spec, pages = case.spec, case.k
    tile = 32 // pages.dtype.itemsize  # keys of a page are whole tiles
    whole_pages = pages.shape[2] % tile == 0 and (spec.chunk_length or 0) % pages.shape[2] == 0
    return case.backend.kernels == "tpu" and case.suits_decode_kernels and whole_pages


def _tpu_paged(q: jax.Array, pages: Pages, tables: jax.Array, spec: AttentionSpec, backend: Backend) -> jax.Array:
    from qwen_jax.kernels.decode import paged_decode_attention

    scales: dict[str, Any] = {"k_scale": pages.k_scale, "v_scale": pages.v_scale, "splits": backend.cores}
    options = _options(spec, backend) | scales
    return paged_decode_attention(q[..., 0, :, :], pages.k, pages.v, _ends(q, spec), tables, **options)[:, None]


def _gpu_paged(q: jax.Array, pages: Pages, tables: jax.Array, spec: AttentionSpec, backend: Backend) -> jax.Array:
    from qwen_jax.kernels.decode_gpu import paged_decode_attention

    scales: dict[str, Any] = {"k_scale": pages.k_scale, "v_scale": pages.v_scale}
    options = _options(spec, backend) | scales
    return paged_decode_attention(q[..., 0, :, :], pages.k, pages.v, _ends(q, spec), tables, **options)[0][:, None]


def _native_paged(q: jax.Array, pages: Pages, tables: jax.Array, spec: AttentionSpec, backend: Backend) -> jax.Array:
    return _native(q, pages.k, pages.v, tables, spec, by_row=False)


def _gathered(q: jax.Array, pages: Pages, tables: jax.Array, spec: AttentionSpec, backend: Backend) -> jax.Array:
    k, v = pages.gathered(tables, 0, _ends(q, spec), q.dtype)
    return attend(q, k, v, spec)


def _by_blocks_of_pages(
    q: jax.Array, pages: Pages, tables: jax.Array, spec: AttentionSpec, backend: Backend
) -> jax.Array:
    count = max(1, PAGED_BLOCK // pages.size)
    tables = jnp.pad(tables, [(0, 0), (0, -tables.shape[1] % count)])
    ends = _ends(q, spec)

    def read(begin: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        ids = lax.dynamic_slice_in_dim(tables, begin // pages.size, count, axis=1)
        k, v = pages.gathered(ids, begin, ends, q.dtype)
        return k, v, begin

    num_keys = tables.shape[1] * pages.size
    return plain.over_key_blocks(q, read, pages.k.shape[0], num_keys, count * pages.size, spec)[0]


def _ends(q: jax.Array, spec: AttentionSpec) -> jax.Array:
    """[B], the place after each row's last query."""
    return jnp.broadcast_to(jnp.asarray(spec.start, jnp.int32) + q.shape[-3], (q.shape[-4],))


PAGED_ROWS = (
    Row("TPU paged decode kernel", _fits_tpu_paged, _tpu_paged, merges=False),
    Row(
        "GPU paged decode kernel",
        lambda case: case.backend.kernels == "gpu" and case.suits_decode_kernels,
        _gpu_paged,
        merges=False,
    ),
    Row("native paged decode kernel", _fits_native, _native_paged, merges=False),
    # what a chunk of a prompt costs to gather is little beside reading it
    Row("pages gathered", lambda case: case.backend.kernels != "cpu" and 1 < case.num_queries, _gathered, merges=False),
    Row("blocks of pages", lambda case: True, _by_blocks_of_pages, merges=False),
)


def attend_pages(q: jax.Array, pages: Pages, tables: jax.Array, spec: AttentionSpec) -> jax.Array:
    """`attend` over the pages [B, M] that `tables` name, causally: queries see no page beyond their own."""
    backend = current_backend()
    row = choose(q, pages.k, spec, backend, rows=PAGED_ROWS)
    log.info("queries %s over pages %s: %s", q.shape, pages.k.shape, row.name)
    return row.run(q, pages, tables, spec, backend)


# --- keys and values that lie side by side ----------------------------------------------------------------------------


def _widened(q: jax.Array, k: Scaled, v: Scaled, spec: AttentionSpec, backend: Backend) -> plain.Attended:
    return attend_lse(q, k.dense(q.dtype), v.dense(q.dtype), spec)


SCALED_ROWS = (
    Row("TPU decode kernel", _fits_tpu_decode, _tpu_decode, merges=False),
    Row("GPU decode kernel", _fits_gpu_decode, _gpu_decode),
    # what several queries cost to widen for is little beside reading it
    Row("widened", lambda case: case.backend.kernels != "cpu" and 1 < case.num_queries, _widened),
    Row("blocks of keys", lambda case: True, _plain(plain.by_key_blocks)),
)


def attend(q: jax.Array, k: Held, v: Held, spec: AttentionSpec) -> jax.Array:
    """softmax(q k^T / sqrt(h)) v on one device, see `plain`: [B, T, H, h] in q's dtype."""
    return _run(q, k, v, spec, merges=False)[0]


def attend_lse(q: jax.Array, k: Held, v: Held, spec: AttentionSpec) -> plain.Attended:
    """`attend`, and the log-sum-exp, float32 [B, H, T], by which attention over parts of the keys is merged."""
    out, lse = _run(q, k, v, spec, merges=True)
    assert lse is not None
    return out, lse


def explain(config: ModelConfig, backend: Backend, capacity: int, prompt: int = 1024) -> dict[str, str]:
    """Which row reads a prompt, a piece of one over a cache of `capacity`, and a single token, by kind of layer."""
    chunk = config.dual_chunk.chunk_length if config.dual_chunk else None
    rows = jnp.zeros(1, jnp.int32)  # places that are not known
    found = {}
    for window in dict.fromkeys(config.layer_windows()):
        layer = "" if window is None else f", window of {window}"
        for name, queries, keys, start in (
            ("prompt", prompt, prompt, 0),
            ("piece of a prompt", prompt, capacity, rows),
            ("token", 1, capacity, rows),
        ):
            here = chunk if chunk and chunk < keys else None
            q = jax.ShapeDtypeStruct((*(3,) * bool(here), 1, queries, config.num_heads, config.head_dim), jnp.bfloat16)
            k = jax.ShapeDtypeStruct((1, config.num_kv_heads, keys, config.head_dim), jnp.bfloat16)
            found[name + layer] = choose(q, k, AttentionSpec(start, window=window, chunk_length=here), backend).name
    return found


def _run(q: jax.Array, k: Held, v: Held, spec: AttentionSpec, *, merges: bool) -> tuple[jax.Array, jax.Array | None]:
    backend = current_backend()
    row = choose(q, k, spec, backend, merges=merges, rows=SCALED_ROWS if isinstance(k, Scaled) else ROWS)
    log.info("queries %s over %s keys %s: %s", q.shape, k.dtype, k.shape, row.name)
    return row.run(q, k, v, spec, backend)
