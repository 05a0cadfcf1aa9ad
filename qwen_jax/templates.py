"""Chat templates, which are other people's programs: run in a process of their own, with limits the kernel holds.

Jinja's sandbox keeps a template from touching anything; it does not keep it from computing for ever or filling the
memory (`9 ** 99999999`, `'%2000000000d' % 1`). So templates run in a child process that is killed when it has used
`SECONDS` of processor time or cannot have more than `MEMORY` bytes. The child is kept, and answers in about a
millisecond.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import sync_do_join
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen_jax.errors import InputError
from qwen_jax.spoken import Speaker, Spoken, common_mark, mark, quoted_mark, speak

SECONDS = 2.0  # of processor time for one prompt
MEMORY = 2**30  # bytes of address space
CHARACTERS = 2**25  # of one prompt
_PATIENCE = 10.0  # seconds on the clock, for a machine that is busy with other things

# --- In the parent ----------------------------------------------------------------------------------------------------


def render(
    template: str,
    messages: Sequence[tuple[Mapping[str, Any], Speaker, bool]],
    variables: Mapping[str, Any],
    own: Mapping[str, str],
) -> Spoken:
    """The text that a template makes of messages.

    messages: JSON objects, each with its speaker and whether its text may hold control tokens.
    variables: further JSON values of the caller's. own: strings that count as the template's, such as eos_token.
    Raises InputError when the template fails or exceeds its limits.
    """
    try:
        request = json.dumps([template, messages, variables, own]).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the messages and tools must be JSON values, nested less deeply ({error}).") from None
    pieces = _child_of_this_process().ask(request)
    return Spoken("".join(text for text, _ in pieces), "".join(mark * len(text) for text, mark in pieces))


class _Child:
    """The process that renders; started when it is first asked, and again after it was killed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes) -> list[list[str]]:
        with self._lock:
            if self._process and self._process.poll() is not None:
                self._kill()
            self._process = self._process or _start()
            try:
                answer = self._exchange(self._process, request + b"\n")
            except BaseException:  # its answer must not be taken for that to the next request
                self._kill()
                raise
        ok, value = json.loads(answer)
        if not ok:
            raise InputError(value)
        return value

    @staticmethod
    def _exchange(process: subprocess.Popen[bytes], request: bytes) -> bytes:
        """The answer, a line. Raises InputError when the template took too long or crashed the process."""
        assert process.stdin and process.stdout
        deadline, answer = time.monotonic() + _PATIENCE, bytearray()
        with contextlib.suppress(BrokenPipeError):  # which the missing answer will show
            process.stdin.write(request)
            process.stdin.flush()
        while not answer.endswith(b"\n"):
            if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise InputError(
                    f"the chat template gave no prompt within {_PATIENCE:g} seconds; use another template."
                )
            chunk = os.read(process.stdout.fileno(), 2**20)
            answer += chunk
            if not chunk and process.wait() == -signal.SIGPROF:
                raise InputError(f"the chat template ran for more than {SECONDS:g} seconds; use another template.")
            if not chunk:
                raise InputError(f"the chat template crashed (status {process.returncode}); use another template.")
        return bytes(answer)

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


_children: dict[int, _Child] = {}  # by process, since a fork must not share its parent's


def _child_of_this_process() -> _Child:
    return _children.setdefault(os.getpid(), _Child())


@atexit.register
def _end() -> None:
    _child_of_this_process()._kill()


def _start() -> subprocess.Popen[bytes]:
    # the template's process needs no secrets of this one's environment, but must find the same modules
    environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "TZ") if name in os.environ}
    paths = [str(Path(__file__).resolve().parents[1]), *filter(None, sys.path)]
    return subprocess.Popen(
        [sys.executable, "-P", "-c", f"from {__name__} import serve; serve()"],
        env=environment | {"PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the parent
    )


# --- In the child -----------------------------------------------------------------------------------------------------


def serve() -> None:
    """Answers requests from standard input until it ends, a line each; one that takes too long kills the process."""
    with contextlib.suppress(ValueError, OSError):  # where there is no such limit, as on macOS, time bounds memory
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    source: BinaryIO = sys.stdin.buffer
    for line in source:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            answer = json.dumps([True, _render(*json.loads(line))])
        except InputError as error:
            answer = json.dumps([False, str(error)])
        except MemoryError:
            answer = json.dumps([False, "the chat template needs more memory than a prompt can; use another template."])
        except RecursionError:
            answer = json.dumps([False, "the chat template, or what it was given, is nested too deeply."])
        except Exception as error:  # a template is a program: it can fail in any way
            said = "".join(c if c.isprintable() else " " for c in str(error)[:1000]).rstrip(". ")
            answer = json.dumps([False, f"the chat template refused the messages: {said}."])
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


def _render(
    template: str, messages: list[tuple[Any, Speaker, bool]], variables: dict[str, Any], own: dict[str, str]
) -> list[tuple[str, str]]:
    ours = speak(own, mark("template", trusted=True))
    spoken = [
        # a role is one of a few words, which frame what is spoken
        speak(message, mark(speaker, trusted=trusted)) | {"role": _Environment.literal(message["role"])}
        for message, speaker, trusted in messages
    ]
    text = _compile(template).render({**ours, **speak(variables, mark("caller")), "messages": spoken})
    if len(text) > CHARACTERS:
        raise InputError(f"the chat template wrote {len(text)} characters; at most {CHARACTERS} are a prompt.")
    return Spoken(text, text.marks).runs if isinstance(text, Spoken) else []


@functools.lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    try:
        return _environment().from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"the chat template is not valid jinja (line {error.lineno}: {error.message}).") from None


@functools.cache
def _environment() -> jinja2.Environment:
    """Jinja set up as `transformers` sets it up, since checkpoints' templates are written for that."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
    environment.filters |= {name: _marked(filter) for name, filter in environment.filters.items()}
    environment.filters |= {"tojson": _tojson, "join": _join}
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


class _CodeGenerator(CodeGenerator):
    """Compiles the template's own text to `Spoken` strings, the only trusted ones, and joins strings as such."""

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return _literal("".join(group))

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:
        self.write(_literal(node.as_const(frame.eval_ctx)))

    def visit_TemplateData(self, node: nodes.TemplateData, frame: Frame) -> None:
        self.write(_literal(node.data))

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat(map(str, (")
        for item in node.nodes:
            self.visit(item, frame)
            self.write(", ")
        self.write(")))")


def _literal(value: Any) -> str:
    """Python source of a constant."""
    if isinstance(value, str):
        return f"environment.literal({value!r})"
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, tuple):
        return f"({''.join(f'{_literal(item)}, ' for item in value)})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_literal(key)}: {_literal(item)}' for key, item in value.items())}}}"
    return repr(value)


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _CodeGenerator

    @staticmethod
    def concat(parts: Iterable[str]) -> Spoken:
        return Spoken("").join(parts)

    @staticmethod
    def literal(text: str) -> Spoken:
        return Spoken(text, mark("template", trusted=True))


class _GenerationBlock(Extension):
    """`{% generation %}` marks what the assistant wrote; it does not change the text."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    @staticmethod
    def _mark(caller: Any) -> str:
        return caller().generated()


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> Spoken:
    # jinja's own filter escapes HTML
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return Spoken(text, quoted_mark(value))


@jinja2.pass_eval_context
def _join(context: nodes.EvalContext, value: Iterable[Any], d: Any = "", attribute: Any = None) -> str:
    return sync_do_join(context, value, d if isinstance(d, Spoken) else Spoken(str(d)), attribute)


def _marked(filter: Any) -> Any:
    """A filter of jinja's that marks its result as its arguments are, where these agree."""

    @functools.wraps(filter)
    def marked(*args: Any, **kwargs: Any) -> Any:
        result = filter(*args, **kwargs)
        if not isinstance(result, str) or isinstance(result, Spoken) or hasattr(result, "__html__"):
            return result
        return Spoken(result, common_mark(args, kwargs))

    return marked


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
