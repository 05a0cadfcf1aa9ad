"""The command `crosscheck`: exit statuses, table, JSON, plot, and what it refuses."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from infer import parity  # noqa: E402
from infer.crosscheck import main, print_report  # noqa: E402
from qwen_jax.errors import InputError  # noqa: E402

SMALL = ["--random", "qwen2", "--variant", "tied", "--tokens", "64", "--greedy", "0"]


def test_table_and_plot_of_a_model_that_agrees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "new" / "depth.png"
    assert main([*SMALL, "--plot", str(picture)]) == 0
    out, err = capsys.readouterr()
    assert "final norm" in out and "gradient layers/attention/k/bias, worst of 4" in out and "limits hold" in out
    assert "DOES NOT HOLD" not in out
    assert "PyTorch reads the weights" in err  # long work shows what it is at
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_json_and_exit_status_when_a_limit_does_not_hold(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "LOGITS_LIMIT", 0.0)
    assert main([*SMALL, "--json"]) == 1
    (report,) = json.loads(capsys.readouterr().out)
    broken = [measure["name"] for measure in report["measures"] if not measure["holds"]]
    assert broken == ["logits"] and report["holds"] is False
    assert len(report["depth"]["ours"]) == 5
    assert sum(measure["name"].startswith("gradient") for measure in report["measures"]) == 2 + 4 * 12


def test_bfloat16_is_held_against_pytorch_in_bfloat16(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--random", "qwen3", "--variant", "plain", "--dtype", "bfloat16", "--json"]) == 0
    measures = {measure["name"]: measure for measure in json.loads(capsys.readouterr().out)[0]["measures"]}
    theirs = measures["KL(PyTorch bfloat16 ‖ PyTorch float32), nats per token"]["value"]
    ours = measures["KL(ours bfloat16 ‖ PyTorch float32), nats per token"]
    assert ours["limit"] == pytest.approx(1.1 * theirs)
    assert 0 < ours["value"] <= ours["limit"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a model"),
        (["default", "--random", "qwen2"], "give either a model"),
        (["--random", "qwen2", "--variant", "ntk"], "no variant 'ntk'; known: plain"),
        (["--random", "qwen2", "--tokens", "1"], "--tokens must be at least 2"),
        (["nowhere/at/all"], "does not exist"),
    ],
)
def test_bad_input(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        main(arguments)


def test_errors_of_tensors() -> None:
    expected = np.array([3.0, 4.0], np.float32)
    measure = parity.tensor_error("x", expected, expected + np.array([0.0, 0.5], np.float32), limit=0.2)
    assert (measure.value, measure.max_abs, measure.holds) == (pytest.approx(0.1), 0.5, True)
    assert not parity.tensor_error("x", expected, np.array([3.0, np.nan], np.float32), limit=1.0).holds
    zero, tiny = np.zeros(2, np.float32), np.full(2, 1e-30, np.float32)
    assert parity.tensor_error("x", zero, zero, limit=0.0).holds
    assert parity.tensor_error("x", zero, tiny).value == math.inf
    assert parity.tensor_error("x", tiny, 2 * tiny).value == pytest.approx(1.0)


def test_greedy_counts_everything_after_the_first_difference() -> None:
    expected = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert parity.compare_greedy(expected, expected).holds
    found = np.array([[1, 9, 3, 4], [5, 6, 7, 8]])
    assert parity.compare_greedy(expected, found).value == 3


def test_worst_of_each_kind_shows_nan(capsys: pytest.CaptureFixture[str]) -> None:
    measures = [parity.Measure(f"gradient a[{i}]", value, 1.0) for i, value in enumerate((0.5, math.nan, 0.7))]
    print_report(parity.Report("m", "float32", 8, measures, {}))
    out = capsys.readouterr().out
    assert "gradient a, worst of 3" in out and "nan" in out and "2 of 3 limits hold" in out


def test_a_folder_without_a_tokenizer_is_compared_on_random_ids(tmp_path: Path, capsys) -> None:
    from infer.torch_reference import variants, write_random

    write_random(variants("qwen2")["tied"], tmp_path)
    assert main([str(tmp_path), "--tokens", "16", "--greedy", "0", "--gradient-tokens", "0"]) == 0
    assert "random ids" in " ".join(capsys.readouterr().out.split())
