"""What `make` installs is locked, and which warnings end a test."""

import configparser
import tomllib
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_every_requirement_is_locked_once(python: str, platform: str) -> None:
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": platform}
    locked: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate(environment):
            name, (specifier,) = canonicalize_name(pin.name), pin.specifier
            assert specifier.operator == "==" and name not in locked
            locked[name] = specifier.version
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    asked = [setup["options"]["install_requires"], *(extras[name] for name in ("dev", "torch", "train"))]
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    for line in [*"\n".join(asked).split("\n"), *build]:
        if line:
            requirement = Requirement(line)
            assert locked[canonicalize_name(requirement.name)] in requirement.specifier


@pytest.mark.parametrize("module", ["qwen_jax.model", "aot.compile", "tests.infer.tiny", "test_chat", "conftest"])
def test_our_own_deprecations_are_errors(module: str) -> None:
    with pytest.raises(FutureWarning):
        warnings.warn_explicit("renamed", FutureWarning, "file.py", 1, module=module)


def test_only_deprecations_of_others_are_not() -> None:
    with warnings.catch_warnings(record=True) as reported:
        for module in ("torch.nn.modules.module", "transformers.trainer", "jax._src.api", "inference"):
            warnings.warn_explicit("renamed", DeprecationWarning, "file.py", 1, module=module)
    assert len(reported) == 4
    with pytest.raises(UserWarning):
        warnings.warn_explicit("some donated buffers were not usable", UserWarning, "file.py", 1, module="jax._src.api")
