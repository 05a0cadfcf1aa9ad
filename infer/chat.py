"""`qwen-jax chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import tyro

from infer.arguments import ModelArguments, SamplingArguments, closing_line
from qwen_jax.errors import InputError
from qwen_jax.local_path import local_path

if TYPE_CHECKING:
    from infer.qwen import Qwen

COMMANDS = """\
/help            this list
/system TEXT     set the system message (without TEXT: show it) and start over
/clear           forget the conversation
/retry           answer the last message again
/set NAME VALUE  temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, seed, max_tokens
/adapter [NAME]  answer with another adapter (without NAME: list them)
/save FILE       write the conversation as JSON
/stats           speed of the last answer
/exit            leave (so does Ctrl-D); Ctrl-C stops an answer"""


@dataclasses.dataclass(frozen=True)
class Arguments(ModelArguments):
    """A conversation with a model in the terminal. /help lists what can be typed besides messages."""

    sampling: tyro.conf.OmitArgPrefixes[SamplingArguments] = dataclasses.field(default_factory=SamplingArguments)
    system: str | None = None
    """A system message; without one the model's chat template has its own."""


class Conversation:
    """The state behind the prompt: messages, settings, and what each typed line does."""

    def __init__(self, models: Mapping[str, Qwen], settings: SamplingArguments, system: str | None) -> None:
        """`models`: by the names of their adapters; the first answers until another is chosen."""
        self.models, self.settings, self.system = models, settings, system
        self.qwen = next(iter(models.values()))
        self.messages: list[dict[str, str]] = []
        self.last = "no answer yet"

    def line(self, text: str) -> bool:
        """Does what one line asks; False ends the conversation. Bad input is said, not raised."""
        try:
            if not text.startswith("/"):
                return self._say(text)
            name, _, rest = text[1:].partition(" ")
            return self._command(name, rest.strip())
        except InputError as error:
            print(error)
            return True

    def _command(self, name: str, rest: str) -> bool:
        if name in ("exit", "quit"):
            return False
        if name == "help":
            print(COMMANDS)
        elif name == "clear":
            self.messages = []
            print("forgotten")
        elif name == "system":
            if rest:
                self.system, self.messages = rest, []
            print(f"system: {self.system or '(the template has its own)'}")
        elif name == "retry":
            if not self.messages:
                raise InputError("there is no message to answer again.")
            while self.messages[-1]["role"] != "user":
                self.messages.pop()
            # the same seed would give the same answer
            self.settings = dataclasses.replace(self.settings, seed=self.settings.seed + 1)
            return self._say(self.messages.pop()["content"])
        elif name == "set":
            self._set(*rest.partition(" ")[::2])
        elif name == "adapter":
            self._adapter(rest)
        elif name == "save":
            self._save(rest)
        elif name == "stats":
            print(self.last)
        else:
            raise InputError(f"there is no command /{name}; /help lists them.")
        return True

    def _set(self, name: str, value: str) -> None:
        if name not in {field.name for field in dataclasses.fields(SamplingArguments)} - {"stop"}:
            raise InputError(f"there is no setting {name!r}; /help lists them.")
        try:
            number = int(value) if name in ("top_k", "seed", "max_tokens") else float(value)
        except ValueError:
            raise InputError(f"{name} needs a number, not {value!r}.") from None
        if name == "max_tokens" and number < 1:
            raise InputError(f"max_tokens={number} leaves nothing to generate; it must be at least 1.")
        changed = dataclasses.replace(self.settings, **{name: number})
        changed.sampling(self.qwen)  # refuses impossible values before they are kept
        self.settings = changed
        print(f"{name} = {number}")

    def _adapter(self, name: str) -> None:
        if name:
            if name not in self.models:
                raise InputError(
                    f"there is no adapter {name!r}; there are: {', '.join(filter(None, self.models)) or 'none'}."
                )
            self.qwen = self.models[name]
        for known, qwen in self.models.items():
            print(f"{'*' if qwen is self.qwen else ' '} {known or '(none)'}")

    def _save(self, file: str) -> None:
        import json

        if not file:
            raise InputError("give a file name: /save FILE.")
        try:
            local_path(file).write_text(json.dumps(self._all(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{file} could not be written ({error.strerror}).") from None
        print(f"saved {file}")

    def _all(self) -> list[dict[str, str]]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.messages

    def _say(self, text: str) -> bool:
        self.messages.append({"role": "user", "content": text})
        try:
            stream = self.qwen.stream(
                [self.qwen.chat_prompt(self._all())],
                self.settings.sampling(self.qwen),
                max_tokens=self.settings.max_tokens,
                stop=self.settings.stop,
                stop_ids=self.qwen.turns.stop_ids,
            )
        except InputError:
            self.messages.pop()
            raise
        try:
            for _, piece in stream:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        print("\n")
        self.messages.append({"role": "assistant", "content": stream.answers[0].text})
        self.last = closing_line(stream.timing)
        return True


def main(argv: Sequence[str]) -> int:
    options = tyro.cli(Arguments, args=argv, prog="qwen-jax chat")
    options.sampling.check()
    models = dict(options.load_each())
    qwen = next(iter(models.values()))
    if not qwen.is_chat_model:
        print("This is a base model: it was not trained to chat.")
    print("Type a message, /help for commands, Ctrl-D to leave.\n")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() editing and history)
    conversation = Conversation(models, options.sampling, options.system)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print("\n(Ctrl-D leaves)")
            continue
        if text and not conversation.line(text):
            return 0
