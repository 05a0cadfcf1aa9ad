"""Rotary position embeddings as data: frequencies, position maps, scales, and the tables made of them."""

import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import DualChunk, DynamicNtkScaling, LinearScaling, ModelConfig, NtkScaling, YarnScaling

Tables = tuple[jax.Array, jax.Array]  # cos and sin, float32 [B, T, h/2]


class Rotary(flax.struct.PyTreeNode):
    """How the queries and the keys of one pass are turned, with every scale on either folded in.

    Queries have one pair of tables, or under Dual Chunk Attention three: for keys of the query's own chunk, of the one
    before, and of earlier ones. Two more are for choosing what sparse prefill reads.
    """

    query: tuple[Tables, ...]
    key: Tables

    @property
    def attending(self) -> tuple[Tables, ...]:
        """Without the two that choose."""
        return self.query[:3]


def rotary_tables(
    config: ModelConfig,
    positions: jax.Array,
    lengths: jax.Array | None = None,
    *,
    dual_chunk: bool = False,
    sparse: bool = False,
) -> Rotary:
    """The tables of int positions [B, T] in whatever scheme `config` names.

    lengths [B] int32: the sequences' true lengths at prefill, which switch on what is done at inference only: Qwen1's
    dynamic NTK and LogN, and the length scaling of Dual Chunk Attention. dual_chunk: make its three query variants;
    a sequence that fits in one chunk needs only the first, which is then plain attention. sparse: make the two more.
    """
    frequencies, scale = inverse_frequencies(config, lengths)
    chunk = config.dual_chunk

    def tables(positions: jax.Array, *scales: jax.Array | None) -> Tables:
        angles = positions[..., None].astype(jnp.float32) * frequencies[:, None, :]
        cos, sin = jnp.cos(angles) * scale, jnp.sin(angles) * scale
        for by in scales:
            if by is not None:
                cos, sin = cos * by[..., None], sin * by[..., None]
        return cos, sin

    growth = dual_chunk_scale(chunk, positions, lengths) if chunk else None
    logn = logn_scale(config, positions, lengths)
    if not (chunk and dual_chunk):
        return Rotary((tables(positions, logn, growth),), tables(positions, growth))
    *maps, key_positions = dual_chunk_positions(chunk, positions)
    if sparse:  # at positions that go on where the clamp would stop them (as released code)
        maps += [chunk.chunk_length + key_positions, chunk.chunk_size + key_positions]
    return Rotary(tuple(tables(at, logn, growth) for at in maps), tables(key_positions, growth))


def inverse_frequencies(config: ModelConfig, lengths: jax.Array | None = None) -> tuple[jax.Array, float]:
    """Angle per position of each pair of the head, float32 [1 or B, h/2], and the factor on both cos and sin.

    `lengths` [B] int32 are the sequences' true lengths at prefill, which Qwen1's dynamic NTK looks at; None is
    training, where it is off.
    """
    scaling, half = config.rope_scaling, config.head_dim // 2
    exponents = np.arange(half, dtype=np.float32) / half
    plain = (1.0 / config.rope_theta**exponents).astype(np.float32)[None]
    if isinstance(scaling, LinearScaling):
        return jnp.asarray(plain / scaling.factor), 1.0
    if isinstance(scaling, NtkScaling):
        base = config.rope_theta * scaling.factor ** (config.head_dim / (config.head_dim - 2))
        return jnp.asarray((1.0 / base**exponents).astype(np.float32)[None]), 1.0
    if isinstance(scaling, YarnScaling):
        return jnp.asarray(_yarn(plain, scaling, config)), yarn_attention_factor(scaling)
    if isinstance(scaling, DynamicNtkScaling) and lengths is not None:
        alpha = ntk_alpha(lengths, scaling.trained_length)
        base = config.rope_theta * alpha ** (config.head_dim / (config.head_dim - 2))  # [B]
        return 1.0 / base[:, None] ** jnp.asarray(exponents)[None], 1.0
    return jnp.asarray(plain), 1.0


def ntk_alpha(lengths: jax.Array, trained_length: int) -> jax.Array:
    """Qwen1's alpha = max(2^ceil(log2(T / trained) + 1) - 1, 1), float32 [B], without rounding at the powers of two."""
    steps = jnp.asarray([min(trained_length << i, 2**31 - 1) for i in range(16)])
    doublings = jnp.sum(lengths[:, None] > steps[None], axis=-1)  # smallest n with trained * 2^n >= T
    return (2.0 ** (doublings + 1) - 1).astype(jnp.float32)


def _yarn(plain: np.ndarray, scaling: YarnScaling, config: ModelConfig) -> np.ndarray:
    """NTK-by-parts (arXiv 2309.00071, section 3.2), with the bounds rounded outwards as released code does."""

    def dimension(rotations: float) -> float:
        wavelengths = math.log(scaling.original_length / (rotations * 2 * math.pi))
        return config.head_dim * wavelengths / (2 * math.log(config.rope_theta))

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), config.head_dim - 1)
    span = high - low if high != low else 0.001
    ramp = np.clip((np.arange(config.head_dim // 2, dtype=np.float32) - low) / span, 0, 1)
    return (plain / scaling.factor * ramp + plain * (1 - ramp)).astype(np.float32)


def yarn_attention_factor(scaling: YarnScaling) -> float:
    """What multiplies cos and sin, so that attention logits gain its square (YaRN section 3.4; mscale as DeepSeek)."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)


def logn_scale(config: ModelConfig, positions: jax.Array, lengths: jax.Array | None) -> jax.Array | None:
    """Qwen1's LogN factor on queries, float32 [B, T]: log_trained(position + 1) beyond the trained length."""
    if config.logn_trained_length is None or lengths is None:
        return None
    ordinal = positions.astype(jnp.float32) + 1
    scale = jnp.log(ordinal) / math.log(config.logn_trained_length)
    return jnp.where(ordinal > config.logn_trained_length, scale, 1.0)


def dual_chunk_positions(chunk: DualChunk, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Rotary positions [B, T] of queries toward keys of their own chunk, the one before and earlier ones; and of keys.

    DCA (arXiv 2402.17463), equations 2, 5 and 7, but clamped at the trained window C as all released code is, where the
    paper writes C - 1.
    """
    length, window = chunk.chunk_length, chunk.chunk_size
    within = positions % length
    return within, jnp.minimum(length + within, window), jnp.full_like(within, min(2 * length - 1, window)), within


def dual_chunk_scale(chunk: DualChunk, positions: jax.Array, lengths: jax.Array | None) -> jax.Array | None:
    """Length scaling of Qwen2.5-1M on queries and on keys, float32 [B, T]: max(1, 0.1 ln(T / original) + 1).

    Qwen2.5-1M report, equation 1. T is the prompt's length in prefill and the current length afterwards; keys keep the
    factor they were written with. None, and no scaling, in training or when the config gives no original length.
    """
    if lengths is None or not chunk.original_length:
        return None
    length = jnp.maximum(lengths[:, None], positions + 1).astype(jnp.float32)
    return jnp.maximum(1.0, 0.1 * jnp.log(length / chunk.original_length) + 1.0)


def rotate(x: jax.Array, tables: Tables) -> jax.Array:
    """Rotates the halves of each head, [B, T, heads, h], in float32; never the interleaved layout."""
    cos, sin = (table[:, :, None, :] for table in tables)  # [B, T, 1, h/2]
    # as wide as a head: from halves XLA:CPU would compute the sines again in every layer
    cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    wide = x.astype(jnp.float32)
    rotated = wide * cos + jnp.roll(wide, x.shape[-1] // 2, axis=-1) * sin
    return rotated.astype(x.dtype)
