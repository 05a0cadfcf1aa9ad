"""Rematerialisation: what of each layer the backward pass finds again instead of computing it a second time."""

from __future__ import annotations

from typing import Any

import jax

from qwen_jax.errors import InputError

# What a layer names by `checkpoint_name`: its input, projections, the attention's result; of a mixture the rows that
# reach a device's experts, and their products.
_DENSE = ("q", "k", "v", "o", "gate", "up", "down", "router", "shared_gate")
_NAMES = ("residual", "attention", *_DENSE, "received", "experts")

# Names for lists, from most memory to least. The layer's input is kept in any case, so that `full` keeps it alone.
_LISTS = {
    "minimal": (*_DENSE, "attention", "received", "experts"),
    "dots": _DENSE,
    "full": (),
    "offload": ("residual@host",),
}


def kept(remat: str) -> tuple[list[str], list[str]] | None:
    """(names kept on the device, names kept in the host's memory) of a policy, or None of `none`, which keeps all.

    `full`, or another name for a list; or a list itself, such as "q,k,v,o" or "q@host,residual@host". Raises InputError
    for what is neither.
    """
    if remat == "none":
        return None
    names = _LISTS.get(remat, tuple(name.strip() for name in remat.split(",")))
    device, host = ([n for n in names if not n.endswith("@host")], [n[:-5] for n in names if n.endswith("@host")])
    if unknown := [name for name in device + host if name not in _NAMES]:
        raise InputError(
            f"{unknown[0]!r} is nothing that rematerialisation keeps; use one of none, {', '.join(_LISTS)}, or a list "
            f"of {', '.join(_NAMES)}, with @host behind what shall lie in the host's memory."
        )
    return device, host


def rematerialised(function: Any, remat: str) -> Any:
    """`function`, one layer, under a policy, see `kept`."""
    lists = kept(remat)
    if lists is None:
        return function
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=lists[0],
        names_which_can_be_offloaded=lists[1],
        offload_src="device",
        offload_dst="pinned_host",
    )
    # a layer in a scan is not merged with its own recomputation anyway
    return jax.checkpoint(function, policy=policy, prevent_cse=False)
