"""The real default model, as a user runs it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from infer.demo import QUESTION


@pytest.mark.slow
def test_the_default_model_writes_a_right_is_prime(default_gguf):
    program = "from qwen_jax.cli import main; main()"
    command = [sys.executable, "-c", program, "generate", "--temperature", "0", QUESTION]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=root)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    code = re.search(r"```python\n(.*?)```", done.stdout, re.S)
    assert code, done.stdout
    # only the function: example calls after it print
    function = re.search(r"(?:^(?:import|from) .*\n+)*^def is_prime\(.*\n(?:[ \t]+.*\n|\n)*", code[1], re.M)
    assert function, code[1]
    names = {}
    exec(function[0], names)
    composite = {0, 1} | {a * b for a in range(2, 501) for b in range(2, 1000 // a + 1)}
    assert [n for n in range(1001) if names["is_prime"](n) == (n in composite)] == []
