"""What a failing disk may do to checkpoints: nothing. Only what twice reads as damaged is set aside."""

from __future__ import annotations

import errno

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from qwen_jax.errors import EnvironmentFailed, InputError
from train.checkpoint import Checkpoints
from train.state import TrainState

RUN = {"model": 1}


def state_of(step: int) -> TrainState:
    return TrainState(jnp.int32(step), {"w": jnp.full((64, 64), step, jnp.float32)}, ())


SHAPES = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state_of(0))


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def folder(tmp_path):
    """The checkpoints of steps 3 and 6."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, print)
    for step in (3, 6):
        checkpoints.save(state_of(step), {"place": step}, RUN)
    checkpoints.close()
    return tmp_path / "checkpoints"


def restore(folder, said, run=RUN):
    checkpoints = Checkpoints(folder, 2, said.append)
    restored = checkpoints.restore(SHAPES, run)
    checkpoints.close()
    if restored is None:
        return None
    state, place = restored
    assert int(state.step) == state.trainable["w"][0, 0] == place["place"]
    return int(state.step)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name[0] != ".")


def failing(monkeypatch, error, when):
    """Every call of Orbax's restore for which `when` of its number holds raises `error`."""
    real, calls = ocp.CheckpointManager.restore, []

    def restore(self, *args, **kwargs):
        calls.append(1)
        if when(len(calls)):
            raise error
        return real(self, *args, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "restore", restore)


PASSING = [
    OSError(errno.ESTALE, "Stale file handle"),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.EMFILE, "Too many open files"),
    PermissionError(errno.EACCES, "Permission denied"),
    MemoryError(),
    TimeoutError("barrier"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
    ValueError("UNAVAILABLE: Error reading key; try again [source locations='x']"),
    ValueError("DATA_LOSS: Error reading local file [os_error_code='5']"),
]


@pytest.mark.parametrize("error", PASSING, ids=lambda error: f"{type(error).__name__} {error}"[:30])
def test_a_fault_that_may_pass_changes_nothing(folder, said, monkeypatch, error):
    with monkeypatch.context() as patch:
        failing(patch, error, lambda call: call % 2 == 0)  # the second of each pair reads the state
        with pytest.raises(EnvironmentFailed, match="checkpoint 6 .* was left as it is"):
            restore(folder, said)
    assert names(folder) == ["3", "6"] and not said
    assert restore(folder, said) == 6


@pytest.mark.parametrize("error", [PASSING[0], ValueError("no such array")], ids=["passing", "senseless"])
def test_what_a_second_read_can_read_is_read(folder, said, monkeypatch, error):
    failing(monkeypatch, error, lambda call: call == 2)
    assert restore(folder, said) == 6
    assert names(folder) == ["3", "6"] and not said


def damage(step) -> None:
    largest = max(step.rglob("d/*"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def test_damage_is_set_aside_and_never_begun_over(folder, said):
    damage(folder / "6")
    assert restore(folder, said) == 3
    assert "checkpoint 6 is damaged" in said[0] and len(names(folder)) == 2
    largest = max((folder / "3").rglob("d/*"), key=lambda file: file.stat().st_size)
    largest.unlink()
    for _ in range(2):  # also when nothing is left but what was set aside
        with pytest.raises(InputError, match="none of the checkpoints"):
            restore(folder, said)
    kept = names(folder)
    assert [name.split(".damaged")[0] for name in kept] == ["3", "6"] and all("damaged" in name for name in kept)


def test_another_run_is_refused(folder, said):
    with pytest.raises(InputError, match="model was 1 and is now 2"):
        restore(folder, said, {"model": 2})
    assert names(folder) == ["3", "6"]


def test_a_second_run_in_the_folder_is_refused(folder, said):
    first = Checkpoints(folder, 2, said.append)
    first.save(state_of(9), {"place": 9}, RUN)
    with pytest.raises(EnvironmentFailed, match="another run, process .* is at work"):
        Checkpoints(folder, 2, said.append)
    first.close()
    assert restore(folder, said) == 9


def test_the_best_is_kept(folder, said):
    checkpoints = Checkpoints(folder, 2, said.append)
    assert checkpoints.best_loss() is None
    for step, loss in ((9, 2.0), (12, 1.0), (15, 3.0), (18, None), (21, 4.0)):
        checkpoints.save(state_of(step), {"place": step}, RUN, loss)
    checkpoints.close()
    assert names(folder) == ["12", "18", "21"]
    checkpoints = Checkpoints(folder, 2, said.append)
    assert checkpoints.best_loss() == 1.0
    checkpoints.close()
