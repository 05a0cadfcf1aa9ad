"""Generation on a mesh gives the tokens of one device."""

import dataclasses
from pathlib import Path

import jax
import pytest

from infer.qwen import Qwen, load
from qwen_jax.config import ModelConfig, MoeConfig
from qwen_jax.errors import InputError
from qwen_jax.model import init
from tests.infer.tiny import CONFIG, save_folder

MOE = dataclasses.replace(CONFIG, model_type="qwen2_moe", moe=MoeConfig(4, 2, 16, 24))
PROMPTS = ["the rain in " * 20, "when the "]


@pytest.mark.parametrize(
    ("config", "mesh"),
    [
        (CONFIG, "fsdp=2,tensor=4"),
        pytest.param(CONFIG, "data=2,context=4", marks=pytest.mark.slow),
        pytest.param(MOE, "expert=4,tensor=2", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_mesh_gives_the_tokens_of_one_device(config: ModelConfig, mesh: str, tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "model", config, init(config, jax.random.key(0)))
    alone, split = load(folder, dtype="float32"), load(folder, dtype="float32", mesh=mesh)

    def answers(qwen: Qwen) -> list[list[int]]:
        sampling = qwen.sampling(temperature=0.0)
        return [answer.tokens for answer in qwen.generate(PROMPTS, sampling, max_tokens=24)]

    assert answers(split) == answers(alone)
    wide = split.params["layers"][0]["attention"]["q"]["kernel"]
    assert wide.addressable_shards[0].data.size < wide.size


def test_mesh_is_checked_before_weights_are_read(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "model", CONFIG, init(CONFIG, jax.random.key(0)))
    with pytest.raises(InputError, match="tensor=8 does not divide this model's 4 attention heads; these do: 1, 2, 4"):
        load(folder, mesh="tensor=8")
    with pytest.raises(InputError, match="'tensors=8' is no size of a mesh axis"):
        load(folder, mesh="tensors=8")
