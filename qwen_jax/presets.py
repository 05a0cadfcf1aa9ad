"""Presets: the released text checkpoints by name, read from `configs/models/*.json` as any config.json is."""

from __future__ import annotations

import difflib
from pathlib import Path

from qwen_jax.config import ModelConfig, load_config
from qwen_jax.errors import InputError

# beside this package both in a checkout and where pip installs it
_FOLDER = Path(__file__).resolve().parent.parent / "configs" / "models"


def preset_names() -> tuple[str, ...]:
    """Names of all presets: the repository names of the checkpoints in lower case, such as `qwen2.5-0.5b-instruct`."""
    return tuple(sorted(path.name.removesuffix(".json") for path in _FOLDER.glob("*.json")))


def preset_path(name: str) -> Path:
    """The config.json of preset `name`, in any case, with or without `Qwen/` first. Raises InputError if unknown."""
    key, names = name.lower().removeprefix("qwen/"), preset_names()
    if key not in names:
        close = difflib.get_close_matches(key, names, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else "`qwen-jax models` lists the known ones."
        raise InputError(f"there is no model named {name!r}; {hint}")
    return _FOLDER / f"{key}.json"


def load_preset(name: str) -> ModelConfig:
    """ModelConfig of a released checkpoint by its name in any case. Raises InputError naming the close ones."""
    return load_config(preset_path(name))
