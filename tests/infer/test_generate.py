"""The real default model, as a user runs it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from infer.demo import QUESTION


def answer(question: str) -> str:
    """What `qwen-jax generate` prints, in a process of its own: the model's memory is not to stay with the tests."""
    program = "from qwen_jax.cli import main; main()"
    command = [sys.executable, "-c", program, "generate", "--temperature", "0", question]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=root)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_the_default_model_knows_a_capital(default_gguf):
    assert answer("What is the capital of France? Answer with one word.") == "Paris\n"


@pytest.mark.slow
def test_the_default_model_writes_a_right_is_prime(default_gguf):
    text = answer(QUESTION)
    code = re.search(r"```python\n(.*?)```", text, re.S)
    assert code, text
    # only the function: example calls after it print
    function = re.search(r"(?:^(?:import|from) .*\n+)*^def is_prime\(.*\n(?:[ \t]+.*\n|\n)*", code[1], re.M)
    assert function, code[1]
    names = {}
    exec(function[0], names)
    composite = {0, 1} | {a * b for a in range(2, 501) for b in range(2, 1000 // a + 1)}
    assert [n for n in range(1001) if names["is_prime"](n) == (n in composite)] == []
