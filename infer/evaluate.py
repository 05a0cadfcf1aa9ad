"""`qwen-jax eval`: how far a model reads, by perplexity and by needles, and what sparse prefill leaves out."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from infer.arguments import ModelArguments
from infer.evaluate_schemes import GRAMMAR, with_scheme
from infer.progress import progress_bar
from qwen_jax.errors import InputError
from qwen_jax.local_path import LocalPath

if TYPE_CHECKING:
    from infer.qwen import Qwen


@dataclasses.dataclass(frozen=True)
class LengthArguments(ModelArguments):
    """What both evaluations take."""

    rope: Annotated[tuple[str, ...], tyro.conf.arg(help=f"Schemes to compare in one run, each: {GRAMMAR}.")] = ("own",)
    trained: int | None = None
    """Trained length that schemes start from; default what the checkpoint's config says."""
    text: tuple[LocalPath, ...] = ()
    """Text files, UTF-8, also .gz."""
    plot: LocalPath | None = None
    """Write a picture to this PNG file."""
    json: bool = False
    """Print a JSON list instead of a table."""

    def schemes(self, qwen: Qwen, longest: int) -> dict[str, Qwen]:
        """The model under each scheme, its context opened to `longest` tokens; all share their parameters."""
        from infer.qwen import Qwen

        found = {}
        for scheme in dict.fromkeys(self.rope):
            config = with_scheme(qwen.config, scheme, trained=self.trained)
            config = dataclasses.replace(config, max_position_embeddings=longest)
            found[scheme] = Qwen(config, qwen.params, qwen.tokenizer, qwen.generation_config, qwen.mesh)
        return found


@dataclasses.dataclass(frozen=True)
class Perplexity(LengthArguments):
    """Perplexity of text files, cut into windows of each length; every length reads the same tokens."""

    lengths: tuple[int, ...] = (1024, 2048, 4096)
    """Tokens per window."""
    stride: int | None = None
    """Begin a window every so many tokens and score only its last ones; default: windows side by side, all scored."""
    max_tokens: int = 32768
    """Read at most so much of the text."""

    def run(self) -> int:
        import numpy as np

        from infer.evaluate_perplexity import measure

        if not self.text:
            raise InputError("perplexity needs a text; give one or more files with --text.")
        shortest, longest = _shortest_longest(self.lengths)
        if shortest < 2 or (self.stride is not None and not 1 <= self.stride <= shortest):
            raise InputError("--lengths must be at least 2, and --stride between 1 and the shortest of them.")
        text = _read(self.text)
        qwen = self.load()
        ids = qwen.tokenizer.encode(text, allow_special=False)
        if min(len(ids), self.max_tokens) < longest:
            raise InputError(
                f"the text gives {min(len(ids), self.max_tokens)} tokens but the longest window is {longest}; "
                "give more text or a larger --max-tokens, or shorten --lengths."
            )
        used = np.asarray(ids[: min(len(ids), self.max_tokens) // longest * longest])
        rows = []
        reads = {n: (len(used) - n) // (self.stride or n) * n + n for n in self.lengths}
        schemes = self.schemes(qwen, longest)
        with progress_bar("perplexity", sum(reads.values()) * len(schemes)) as advance:
            for scheme, model in schemes.items():
                for length in self.lengths:
                    began = time.perf_counter()
                    with model.entered():
                        found = measure(model.config, model.params, used, length, stride=self.stride, advance=advance)
                    seconds = time.perf_counter() - began
                    rows.append(
                        {"rope": scheme}
                        | dataclasses.asdict(found)
                        | {"perplexity": found.perplexity, "tokens_per_second": reads[length] / seconds}
                    )
        if self.json:
            print(json.dumps([_finite(row) for row in rows], indent=2))
        else:
            self._print(rows, len(used))
        if self.plot:
            self._save(rows, self.plot)
        return 0

    def _print(self, rows: Sequence[dict[str, Any]], used: int) -> None:
        cells = {(row["rope"], row["length"]): f"{row['perplexity']:.3f}" for row in rows}
        title = f"Perplexity of {used} tokens, by length of context"
        _print_table(title, "rope", dict.fromkeys(row["rope"] for row in rows), self.lengths, cells)

    def _save(self, rows: Sequence[dict[str, Any]], path: Path) -> None:
        figure = _figure(8.0, 5.0)
        axes = figure.subplots()
        for scheme in dict.fromkeys(row["rope"] for row in rows):
            of = [row for row in rows if row["rope"] == scheme]
            axes.plot([row["length"] for row in of], [row["perplexity"] for row in of], marker="o", label=scheme)
        axes.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="perplexity", title=self.model)
        axes.set_xticks(self.lengths, map(str, self.lengths))
        axes.minorticks_off()
        axes.legend()
        _save(figure, path)


@dataclasses.dataclass(frozen=True)
class Needle(LengthArguments):
    """Hides a sentence with a number at several depths of texts of several lengths, and asks for the number."""

    lengths: tuple[int, ...] = (1024, 2048, 4096)
    """Tokens of the whole prompt."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where the needle lies: 0 at the beginning, 1 at the end."""
    trials: int = 1
    """Prompts for each length and depth, with different numbers, answered together."""
    seed: int = 0
    """Of names, numbers and where in the text the haystack begins."""

    def run(self) -> int:
        from infer.evaluate_needle import ANSWER_TOKENS, Haystack, scores

        _, longest = _shortest_longest(self.lengths)
        if self.trials < 1 or not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise InputError("--trials must be at least 1, and --depths between 0 and 1.")
        text = _read(self.text)
        qwen = self.load()
        haystack = Haystack(qwen, text)
        cells = [(length, depth) for length in self.lengths for depth in self.depths]
        seeds = [self.seed * self.trials + i for i in range(self.trials)]
        prompts = {cell: [haystack.trial(*cell, seed) for seed in seeds] for cell in cells}
        rows = []
        schemes = self.schemes(qwen, longest + ANSWER_TOKENS)
        total = sum(len(trial.prompt) for trials in prompts.values() for trial in trials) * len(schemes)
        with progress_bar("needle", total) as advance:
            for scheme, model in schemes.items():
                for (length, depth), trials in prompts.items():
                    score = sum(scores(model, trials)) / len(trials)
                    rows.append(
                        {"rope": scheme, "length": length, "depth": depth, "score": score, "trials": len(trials)}
                    )
                    advance(sum(len(trial.prompt) for trial in trials))
        if self.json:
            print(json.dumps(rows, indent=2))
        else:
            for scheme in schemes:
                found = {(f"{r['depth']:.0%}", r["length"]): f"{r['score']:.0%}" for r in rows if r["rope"] == scheme}
                title = f"Needles found, {scheme}, by depth and length of the prompt"
                _print_table(title, "depth", [f"{depth:.0%}" for depth in self.depths], self.lengths, found)
        if self.plot:
            self._save(rows, list(schemes), self.plot)
        return 0

    def _save(self, rows: Sequence[dict[str, Any]], schemes: Sequence[str], path: Path) -> None:
        figure = _figure(1.5 + 4.0 * len(schemes), 4.0)
        scores = {(row["rope"], row["depth"], row["length"]): row["score"] for row in rows}
        image = None
        for axes, scheme in zip(figure.subplots(1, len(schemes), squeeze=False)[0], schemes, strict=True):
            grid = [[scores[scheme, depth, length] for length in self.lengths] for depth in self.depths]
            image = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", alpha=0.6, aspect="auto")
            for y, row in enumerate(grid):
                for x, score in enumerate(row):
                    axes.text(x, y, f"{score:.0%}", ha="center", va="center")
            axes.set_xticks(range(len(self.lengths)), map(str, self.lengths))
            axes.set_yticks(range(len(self.depths)), [f"{depth:.0%}" for depth in self.depths])
            axes.set(xlabel="tokens", ylabel="depth of the needle", title=f"{self.model}, {scheme}")
        assert image
        figure.colorbar(image, ax=figure.axes, label="found")
        _save(figure, path)


@dataclasses.dataclass(frozen=True)
class Sparse(ModelArguments):
    """Searches how many columns and diagonals each head must read so that sparse prefill keeps its attention.

    The result is the sparse_attention_config.json of a Qwen2.5-1M folder.
    """

    text: tuple[LocalPath, ...] = ()
    """Text files, UTF-8, also .gz, to calibrate on."""
    tokens: int = 4096
    """Length of the calibration prompt; the budgets hold for lengths like it."""
    rope: Annotated[str, tyro.conf.arg(help=f"A scheme in place of the checkpoint's: {GRAMMAR}.")] = "own"
    recall: float = 0.9
    """Share of its attention that every head shall keep, on average over the last queries."""
    columns: int = 30
    """Columns that every head begins with."""
    diagonals: int = 128
    """Diagonals that every head begins with."""
    step: int = 256
    """What a head below the recall gets more of both, each round."""
    rounds: int = 8
    """At most so many rounds."""
    output: LocalPath | None = None
    """Write the budgets found to this JSON file."""
    json: bool = False
    """Print a JSON list of the rounds instead of a table."""

    def run(self) -> int:
        import numpy as np

        from infer.evaluate_sparse import as_config, search
        from qwen_jax.hf_config import sparse_to_hf

        if not self.text:
            raise InputError("sparse needs a text to calibrate on; give one or more files with --text.")
        if (
            not 0 < self.recall < 1
            or min(self.columns, self.diagonals, self.step, self.rounds) < 1
            or self.tokens < 128
        ):
            raise InputError(
                "--recall must be between 0 and 1, --columns, --diagonals, --step and --rounds at least 1, "
                "and --tokens at least 128."
            )
        text = _read(self.text)
        qwen = self.load()
        ids = np.asarray(qwen.tokenizer.encode(text, allow_special=False)[: self.tokens])
        if len(ids) < self.tokens:
            raise InputError(f"the text gives {len(ids)} tokens, fewer than --tokens {self.tokens}; give more text.")
        config = dataclasses.replace(with_scheme(qwen.config, self.rope), max_position_embeddings=self.tokens)
        wanted = {name: getattr(self, name) for name in ("recall", "columns", "diagonals", "step", "rounds")}
        with progress_bar("layers", self.rounds * config.num_layers, unit="layers") as advance, qwen.entered():
            found = search(config, qwen.params, ids, **wanted, advance=advance)
        rows = [
            {
                "round": i,
                "heads below": int((one.recall < self.recall).sum()),
                "mean recall": round(float(one.recall.mean()), 4),
                "lowest recall": round(float(one.recall.min()), 4),
                "mean columns": round(float(np.minimum(one.vertical, len(ids)).mean())),
                "mean diagonals": round(float(np.minimum(one.slash, len(ids)).mean())),
            }
            for i, one in enumerate(found)
        ]
        if self.json:
            print(json.dumps(rows, indent=2))
        else:
            title = f"Sparse prefill of {self.tokens} tokens, {config.num_layers * config.num_heads} heads"
            headings = list(rows[0])[1:]
            cells = {(str(row["round"]), heading): str(row[heading]) for row in rows for heading in headings}
            _print_table(title, "round", [str(row["round"]) for row in rows], headings, cells)
        if self.output:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.output.write_text(json.dumps(sparse_to_hf(as_config(found[-1], len(ids)))), encoding="utf-8")
        return 0 if rows[-1]["heads below"] == 0 else 1


def main(argv: Sequence[str]) -> int:
    """The subcommand `eval`. Raises InputError when the text, the lengths or a scheme cannot be used."""
    kinds = (
        Annotated[Needle, tyro.conf.subcommand("needle")]
        | Annotated[Perplexity, tyro.conf.subcommand("perplexity")]
        | Annotated[Sparse, tyro.conf.subcommand("sparse")]
    )
    options: Any = tyro.cli(
        tyro.conf.OmitArgPrefixes[kinds], args=list(argv), prog="qwen-jax eval", description=__doc__
    )
    return options.run()


# --- What both need ---------------------------------------------------------------------------------------------------


def _shortest_longest(lengths: Sequence[int]) -> tuple[int, int]:
    if not lengths:
        raise InputError("--lengths is empty; give at least one number of tokens.")
    return min(lengths), max(lengths)


def _read(paths: Sequence[Path]) -> str:
    texts = []
    for path in paths:
        try:
            raw = path.read_bytes()
            texts.append((gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8"))
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not a readable UTF-8 text ({error}); give plain text files.") from None
    return "\n".join(texts)


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has neither infinity nor nan."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _print_table(
    title: str, corner: str, names: Any, headings: Sequence[Any], cells: dict[tuple[str, Any], str]
) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(corner, no_wrap=True)
    for heading in headings:
        table.add_column(str(heading), justify="right", no_wrap=True)
    for name in names:
        table.add_row(name, *(cells[name, heading] for heading in headings))
    console = Console()
    if not console.is_terminal:  # a pipe gets whole rows, not rows cut at 80 columns
        console = Console(width=160)
    console.print(title, highlight=False)
    console.print(table)
    console.print()


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs matplotlib; run: pip install 'qwen-jax[plot]'.") from None
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
