"""The console command: its table, its speed of import, its exit statuses."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import types

import pytest

from qwen_jax import cli
from qwen_jax.errors import InputError


def exit_status(argv: list[str]) -> int | str | None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    return stopped.value.code


@pytest.fixture
def command(monkeypatch):
    """Installs a function as the subcommand `probe`."""

    def install(function):
        module = types.ModuleType("probe_module")
        vars(module)["main"] = function
        monkeypatch.setitem(sys.modules, "probe_module", module)
        monkeypatch.setitem(cli.COMMANDS, "probe", ("probe_module:main", "a test"))

    return install


def test_help_imports_neither_jax_nor_any_other_heavy_library():
    code = (
        "import sys; from qwen_jax.cli import run; run(['--help']);"
        "heavy = {'jax', 'flax', 'numpy', 'transformers', 'torch', 'tyro', 'rich'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in cli.COMMANDS)


def test_help_is_aligned(capsys):
    assert exit_status([]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [row.split()[0] for row in rows] == list(cli.COMMANDS)
    assert len({row.index(summary) for row, (_, summary) in zip(rows, cli.COMMANDS.values(), strict=True)}) == 1


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_its_function(name):
    module, function = cli.COMMANDS[name][0].split(":")
    spec = importlib.util.find_spec(module)
    assert spec and spec.origin, f"{module} does not exist"
    with open(spec.origin, encoding="utf-8") as file:
        assert f"def {function}(" in file.read()


def test_unknown_command_names_the_close_ones(capsys):
    assert exit_status(["modles"]) == 2
    assert capsys.readouterr().err == "qwen-jax: there is no command 'modles'; did you mean models?\n"


def test_bad_input_is_one_sentence_and_status_2(command, capsys):
    def refuse(argv):
        raise InputError("that will not do.")

    command(refuse)
    assert exit_status(["probe"]) == 2
    assert capsys.readouterr().err == "qwen-jax: that will not do.\n"


def test_interrupt_is_status_130(command):
    def interrupt(argv):
        raise KeyboardInterrupt

    command(interrupt)
    assert exit_status(["probe"]) == 130


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (1, 1)])
def test_status_and_arguments_pass_through(command, returned, status):
    seen = []

    def record(argv):
        seen.append(argv)
        return returned

    command(record)
    assert exit_status(["probe", "--x", "1"]) == status
    assert seen == [["--x", "1"]]


def test_models_json(capsys):
    assert exit_status(["models", "qwen2.5-0.5B", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == {"qwen2.5-0.5b", "qwen2.5-0.5b-instruct"}
    row = rows["qwen2.5-0.5b"]
    assert (row["params"], row["kv_bytes_per_token"], row["bf16_bytes"]) == (494_032_768, 12_288, 988_065_536)


def test_models_quantised_memory_by_hand(capsys):
    """Qwen2.5-0.5B, 24 layers of q 896x896, k and v 128x896, o 896x896, gate and up 4864x896, down 896x4864."""
    assert exit_status(["models", "qwen2.5-0.5b-instruct", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    weights = 24 * (896 * 896 * 2 + 128 * 896 * 2 + 4864 * 896 * 3)
    scales = 24 * 2 * (7 * (896 + 128 + 128 + 896 + 4864 + 4864) + 38 * 896)
    rest = 2 * (494_032_768 - weights)
    assert row["int8_bytes"] == weights + scales + rest
    assert row["int4_bytes"] == weights // 2 + scales + rest


def test_models_table_is_whole_in_a_pipe(capsys):
    assert exit_status(["models"]) == 0
    header, *rows, note = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["model", "params"] and note.startswith("heads:")
    assert all(len(row.split()) == 11 for row in rows) and len({len(row.rstrip()) for row in rows}) == 1


def test_models_filter_without_a_match(capsys):
    assert exit_status(["models", "llama"]) == 2
    assert "no model's name contains 'llama'" in capsys.readouterr().err
