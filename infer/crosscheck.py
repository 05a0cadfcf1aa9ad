"""`qwen-jax crosscheck`: the numbers are PyTorch's, stage by stage, as a table."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from qwen_jax.config import ModelType
from qwen_jax.errors import InputError
from qwen_jax.local_path import LocalPath

if TYPE_CHECKING:
    from infer.parity import Measure, Report


@dataclasses.dataclass(frozen=True)
class Crosscheck:
    """Runs a model in PyTorch (transformers, eager attention, CPU) and in JAX and compares every stage.

    float32: embedding, each layer, final norm, logits, log-probabilities, loss, the gradient of every tensor and greedy
    decoding. bfloat16: ours may be no further from PyTorch in float32 than 1.1 times PyTorch in bfloat16 is. Exit
    status 1 when a limit does not hold.
    """

    model: tyro.conf.Positional[str] = ""
    """"default" (the default model), a model folder, a .gguf file or a Hugging Face id"""
    random: ModelType | None = None
    """instead of a model: small random models of this architecture, tied and untied, windowed, YaRN and so on"""
    variant: str = ""
    """only this one of the random models"""
    tokens: int = 512
    """length of the prompt, English, Chinese and code; repeated where that is not enough"""
    gradient_tokens: int = 256
    """the loss and its gradients are of this many first tokens; 0 leaves them out"""
    greedy: int = 256
    """tokens to decode after each of the built-in prompts; 0 leaves it out"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """what to compute in"""
    plot: LocalPath | None = None
    """write the error by depth to this PNG file"""
    json: bool = False
    """print a JSON list, with the gradient of every single tensor"""


def main(argv: list[str]) -> int:
    """The subcommand `crosscheck`. Raises InputError when there is nothing to compare with."""
    options = tyro.cli(Crosscheck, args=argv, prog="qwen-jax crosscheck")
    if bool(options.model) == bool(options.random):
        raise InputError("give either a model (such as `default`) or --random with an architecture.")
    if options.tokens < 2 or options.gradient_tokens == 1 or min(options.gradient_tokens, options.greedy) < 0:
        raise InputError("--tokens must be at least 2, --gradient-tokens 0 or at least 2, --greedy at least 0.")
    _require_torch()
    with _progress() as say:
        reports = list(_random_reports(options, say)) if options.random else [_real_report(options, say)]
    if options.json:
        print(json.dumps([_as_json(report) for report in reports], indent=2))
    else:
        for report in reports:
            print_report(report)
    if options.plot:
        plot_depth(reports, options.plot)
    return 0 if all(report.holds for report in reports) else 1


def _require_torch() -> None:
    os.environ["TQDM_DISABLE"] = "1"  # transformers' bars would run into ours
    try:
        import accelerate  # noqa: F401
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        raise InputError(
            f"{error.name} is missing; install what this compares with: pip install 'qwen-jax[torch]'."
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Shows on stderr what is being done: one changing line, or in a pipe one line each."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda stage: console.print(stage, markup=False, highlight=False, soft_wrap=True)
        return
    with console.status("starting") as status:
        yield status.update


def _random_reports(options: Crosscheck, say: Callable[[str], None]) -> Iterator[Report]:
    from infer.parity_texts import TEXTS, folded
    from infer.torch_reference import variants, write_random

    assert options.random
    known = variants(options.random)
    if options.variant and options.variant not in known:
        raise InputError(f"{options.random} has no variant {options.variant!r}; known: {', '.join(known)}.")
    for name in [options.variant] if options.variant else known:
        with tempfile.TemporaryDirectory() as folder:
            write_random(known[name], Path(folder))
            prompts = [folded(text, known[name].config.vocab_size) for text in TEXTS]
            yield _check(Path(folder), prompts, options, f"{options.random} {name}", say)


def _real_report(options: Crosscheck, say: Callable[[str], None]) -> Report:
    import numpy as np

    from infer.parity_texts import TEXTS
    from qwen_jax.tokenizer import load_tokenizer
    from qwen_jax.weights.checkpoint import TensorCheckpoint
    from qwen_jax.weights.open import open_checkpoint

    checkpoint = open_checkpoint(options.model)
    if not isinstance(checkpoint, TensorCheckpoint):
        raise InputError(f"PyTorch cannot read {options.model}; `qwen-jax convert` it to a Hugging Face folder first.")
    name = options.model
    try:
        prompts = load_tokenizer(checkpoint.source).encode_batch(TEXTS)
    except InputError as error:  # the weights can be compared all the same
        say(f"random ids instead of text: {error}")
        drawn, name = np.random.default_rng(0), f"{name}, random ids"
        prompts = [drawn.integers(0, checkpoint.config.vocab_size, len(text)).tolist() for text in TEXTS]
    return _check(checkpoint.source, prompts, options, name, say)


def _check(path: Path, prompts: list[list[int]], options: Crosscheck, name: str, say: Callable[[str], None]) -> Report:
    from infer import parity

    return parity.check(
        path,
        prompts,
        name=name,
        num_tokens=options.tokens,
        gradient_tokens=options.gradient_tokens,
        greedy_tokens=options.greedy,
        dtype=options.dtype,
        say=lambda stage: say(f"{name}: {stage}"),
    )


# --- What is shown ----------------------------------------------------------------------------------------------------


def _as_json(report: Report) -> dict[str, Any]:
    measures = [dataclasses.asdict(measure) | {"holds": measure.holds} for measure in report.measures]
    return dataclasses.asdict(report) | {"measures": measures, "holds": report.holds}


def print_report(report: Report) -> None:
    """Prints one report as a table; of the gradients, the worst of each kind over the layers."""
    from rich.console import Console
    from rich.table import Table

    title = f"{report.model}, {report.dtype}, {report.num_tokens} tokens"
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    table.add_column("compared", no_wrap=True)
    for heading in ("max abs", "relative or value", "limit"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for measure in _worst_of_each_kind(report.measures):
        verdict = "" if measure.limit is None else "[green]ok[/]" if measure.holds else "[red]DOES NOT HOLD[/]"
        numbers = (measure.max_abs, measure.value, measure.limit)
        table.add_row(measure.name, *("" if n is None else f"{n:.3g}" for n in numbers), verdict)
    console = Console()
    if not console.is_terminal:  # a pipe gets whole rows, not rows cut at 80 columns
        console = Console(width=160)
    console.print(table)
    limited = [measure for measure in report.measures if measure.limit is not None]
    held = sum(measure.holds for measure in limited)
    console.print(f"{held} of {len(limited)} limits hold.\n", highlight=False)


def _worst_of_each_kind(measures: Sequence[Measure]) -> list[Measure]:
    kinds: dict[str, list[Measure]] = {}
    for measure in measures:
        kinds.setdefault(re.sub(r"\[[\d, ]+\]$", "", measure.name), []).append(measure)
    worst = []
    for kind, group in kinds.items():
        measure = max(group, key=lambda measure: (math.isnan(measure.value), measure.value))
        name = kind if len(group) == 1 else f"{kind}, worst of {len(group)}"
        worst.append(dataclasses.replace(measure, name=name))
    return worst


def plot_depth(reports: Sequence[Report], path: Path) -> None:
    """Writes a PNG of the relative error of the residual stream by depth. Raises InputError without matplotlib."""
    from infer.parity import HIDDEN_LIMIT

    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs matplotlib; run: pip install 'qwen-jax[plot]'.") from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for report in reports:
        for label, errors in report.depth.items():
            name = report.model if label == "ours" else f"{report.model}, {label}"
            axes.plot(range(len(errors)), [error or math.nan for error in errors], marker=".", label=name)
    if all(report.dtype == "float32" for report in reports):
        axes.axhline(HIDDEN_LIMIT, color="gray", linestyle="--", label="limit")
    axes.set(yscale="log", xlabel="layers passed", ylabel="‖Δ‖ / ‖PyTorch float32‖", title="Error by depth")
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
