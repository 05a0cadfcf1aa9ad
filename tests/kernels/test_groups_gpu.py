"""Products with groups of int4 and int8 on GPUs, interpreted, against NumPy's in float64."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.backend import Backend
from qwen_jax.kernels import groups_gpu
from qwen_jax.leaves import Grouped, matmul


class Case(NamedTuple):
    out: tuple[int, ...]
    groups: int
    group: int
    rows: int
    values: str
    zero: bool = False
    dtype: str = "float32"


CASES = [
    Case((48,), 3, 32, 1, "int4"),
    Case((4, 64), 2, 128, 5, "int4", zero=True),
    Case((112,), 1, 384, 40, "int4", zero=True),
    Case((64,), 12, 64, 17, "int8"),
    Case((3, 16), 2, 128, 64, "int8", zero=True, dtype="bfloat16"),
    Case((128,), 8, 128, 8, "int4", dtype="bfloat16"),
]
# 7B's MLP and its keys, as they run on a GPU
LARGE = [
    Case((18944,), 28, 128, 8, "int4", zero=True, dtype="bfloat16"),
    Case((3584,), 148, 128, 64, "int4", dtype="bfloat16"),
    Case((4, 128), 28, 128, 1, "int8", dtype="bfloat16"),
    Case((896,), 14, 64, 3, "int4"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: Case) -> None:
    check(case, interpret=True)


def check(case: Case, interpret: bool) -> None:
    rng = np.random.default_rng(case.rows)
    shape = (*case.out, case.groups, case.group)
    most = 8 if case.values == "int4" else 128

    def integers(shape: tuple[int, ...]) -> np.ndarray:
        return rng.integers(-most, most, shape).astype(np.int8)

    values, scale = integers(shape), rng.random(shape[:-1]).astype(np.float16)
    zero = integers(shape[:-1]) if case.zero else None
    narrow: Any = [None if x is None else jnp.asarray(x).astype(case.values) for x in (values, zero)]
    weight = Grouped(narrow[0], jnp.asarray(scale), narrow[1])
    x = jnp.asarray(rng.standard_normal((case.rows, case.groups * case.group)), case.dtype)
    assert groups_gpu.fits(case.rows, narrow[0])
    with Backend("gpu", interpret=interpret).entered():
        y = jax.jit(lambda weight, x: matmul(weight, x))(weight, x)
    dense = (values.astype(np.float64) - (0 if zero is None else zero[..., None])) * scale.astype(np.float64)[..., None]
    expected = np.asarray(x, np.float64) @ dense.reshape(-1, x.shape[1]).T
    # the integers and so their products with bfloat16 are exact in either dtype: only sums are rounded
    assert np.linalg.norm(np.asarray(y, np.float64).reshape(expected.shape) - expected) <= 1e-6 * np.linalg.norm(
        expected
    )


def test_what_does_not_fit_is_multiplied_by_xla() -> None:
    assert not groups_gpu.fits(65, jnp.zeros((16, 2, 32), jnp.int8))
    for shape in ((16, 2, 24), (20, 2, 32)):
        assert not groups_gpu.fits(1, jnp.zeros(shape, jnp.int4))
    assert not groups_gpu.fits(1, jnp.zeros((16, 2, 32), jnp.float8_e4m3fn))
    weight = Grouped(jnp.ones((20, 2, 24), jnp.int4), jnp.ones((20, 2)))
    with Backend("gpu", interpret=True).entered():
        np.testing.assert_allclose(matmul(weight, jnp.ones((3, 48))), np.full((3, 20), 48))
