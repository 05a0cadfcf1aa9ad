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


@pytest.mark.parametrize(("remat", "products"), [("full", 2), ("q", 1), ("k", 1), ("q,k", 0)])
def test_what_is_not_kept_is_computed_again(remat: str, products: int) -> None:
    """Two exponentials, whose gradients need their values: those of the forward pass, and those computed again."""

    def layer(x: jax.Array) -> jax.Array:
        return checkpoint_name(jnp.exp(checkpoint_name(jnp.exp(x), "q")), "k")

    text = str(jax.make_jaxpr(jax.grad(rematerialised(layer, remat)))(1.0))
    assert text.count("= exp ") == 2 + products
