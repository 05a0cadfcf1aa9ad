"""Exported folders in `transformers`: it made the weights, and must load the same ones from us and compute the same."""

from __future__ import annotations

import pytest

from qwen_jax.weights.export import save_hf
from qwen_jax.weights.load import ParamsCheckpoint, load_params
from qwen_jax.weights.open import open_checkpoint
from qwen_jax.weights.orbax import save_orbax
from tests.weights.tiny import HF_CONFIGS, assert_bit_equal, read_state

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", HF_CONFIGS)
def test_export_of_a_transformers_model(tmp_path, model_type, dtype):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**HF_CONFIGS[model_type])
    theirs = transformers.AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in theirs.parameters():  # norms and biases too
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    # .to(bfloat16) has rounded the rotary frequencies as well, which no loaded model has
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype="auto")

    source = open_checkpoint(tmp_path / "theirs")
    params = load_params(source, progress=False)
    save_hf(ParamsCheckpoint(params, source.config, source), tmp_path / "ours", progress=False)
    save_orbax(source, tmp_path / "orbax", progress=False)
    save_hf(open_checkpoint(tmp_path / "orbax"), tmp_path / "through_orbax", progress=False)

    for folder in ("ours", "through_orbax"):
        assert_bit_equal(read_state(tmp_path / "theirs"), read_state(tmp_path / folder))
        ours, report = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / folder, dtype="auto", output_loading_info=True
        )
        assert not any(report.values()), report
        expected = theirs.state_dict()
        assert ours.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())
        tokens = torch.randint(0, config.vocab_size, (2, 40))
        with torch.no_grad():
            assert torch.equal(ours.eval()(tokens).logits, theirs.eval()(tokens).logits)
