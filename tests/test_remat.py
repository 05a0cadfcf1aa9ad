"""Rematerialisation policies: names, lists, and what a gradient is then left to find."""

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

from qwen_jax.errors import InputError
from qwen_jax.remat import kept, rematerialised


@pytest.mark.parametrize(
    ("remat", "lists"),
    [
        ("none", None),
        ("full", ([], [])),
        ("offload", ([], ["residual"])),
        ("q,k, v", (["q", "k", "v"], [])),
        ("q@host,o,residual@host", (["o"], ["q", "residual"])),
    ],
)
def test_lists(remat: str, lists: tuple[list[str], list[str]] | None) -> None:
    assert kept(remat) == lists


@pytest.mark.parametrize("remat", ["everything", "q,nothing", "", "q@device"])
def test_what_is_no_policy(remat: str) -> None:
    with pytest.raises(InputError, match="nothing that rematerialisation keeps"):
        kept(remat)


def test_what_is_not_kept_is_computed_again() -> None:
    """The gradient of the second sine needs the value of the first."""

    def sines(remat: str) -> int:
        def layer(x: jax.Array) -> jax.Array:
            return checkpoint_name(jnp.sin(checkpoint_name(jnp.sin(x), "q")), "k")

        return str(jax.make_jaxpr(jax.grad(rematerialised(layer, remat)))(1.0)).count("= sin ")

    assert sines("full") == sines("k") == sines("q") + 1 == sines("q@host,k") + 1
