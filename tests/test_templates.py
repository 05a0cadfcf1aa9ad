"""Templates within their limits, and beyond them."""

import concurrent.futures
import signal
import time

import pytest

from qwen_jax import templates
from qwen_jax.errors import InputError

MESSAGE = [({"role": "user", "content": "x"}, "user", False)]


def render(template: str, **variables) -> str:
    return templates.render(template, MESSAGE, variables, {})


HOSTILE = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 9 ** 99999999 }}",
    "repeated": "{{ 'a' * 2000000000 }}",
    "repeated list": "{{ ([1] * 2000000000) | length }}",
    "width": "{{ '%2000000000d' % 1 }}",
    "format": "{{ '{:>2000000000}'.format(1) }}",
    "centred": "{{ 'a' | center(2000000000) }}",
    "justified": "{{ 'a'.ljust(2000000000) }}",
    "lorem": "{{ lipsum(n=100000000) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "mutual recursion": "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "nested list": "{% set n = namespace(x=[]) %}{% for i in range(99999) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x }}",
    "long output": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "digits": "{{ (10 ** 100000) | string | length }}",
    "slices": "{{ range(99999) | slice(100000000) | list | length }}",
    "folded": "{{ 'a' * 2000000000 if false }}{{ 2 ** (2 ** 40) if messages else '' }}",
    "nested source": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nested blocks": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
}


# the others use up their two seconds
QUICK = {"loops", "repeated", "width", "format", "recursion", "nested source", "nested blocks"}


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in HOSTILE])
def test_hostile_templates_end_in_a_sentence(name):
    began = time.monotonic()
    with pytest.raises(InputError, match=r"^[^\n]*$"):
        render(HOSTILE[name])
    assert time.monotonic() - began < 2 * templates._PATIENCE
    assert render("{{ messages[0].content }}") == "x", "the next one is answered"


def test_a_child_that_hangs_or_is_gone(monkeypatch):
    assert render("x") == "x"
    child = templates._child_of_this_process()
    assert child._process
    monkeypatch.setattr(templates, "_PATIENCE", 0.5)
    child._process.send_signal(signal.SIGSTOP)
    with pytest.raises(InputError, match="gave no prompt within 0.5 seconds"):
        render("x")
    monkeypatch.undo()
    assert render("x") == "x"
    assert child._process
    child._process.kill()
    child._process.wait()
    assert render("x") == "x"


def test_threads_get_their_own_answers():
    hostile = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        bad = pool.submit(render, hostile)
        good = [pool.submit(render, "{{ n }}", n=n) for n in range(50)]
        assert [future.result() for future in good] == [str(n) for n in range(50)]
        with pytest.raises(InputError, match="ran for more than"):
            bad.result()


def test_the_child_has_no_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    process = templates._start()
    try:
        with open(f"/proc/{process.pid}/environ", "rb") as file:
            assert b"secret" not in file.read()
    finally:
        process.kill()
        process.communicate()


def test_what_is_no_json_is_refused():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in (object(), deep):
        with pytest.raises(InputError, match="must be JSON values"):
            render("x", value=value)


def test_a_long_message_is_no_hostile_one():
    text = "one two " * 500_000
    assert (
        templates.render(
            "{{ messages[0].content | trim }}", [({"role": "user", "content": text}, "user", False)], {}, {}
        )
        == text.strip()
    )
