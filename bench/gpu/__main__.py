"""`python -m bench.gpu --out DIR`: everything that needs a GPU, in under eight minutes on one H100 or H200.

Each section runs in a process of its own, under a limit of its own, and appends its results to DIR/gpu.jsonl as
they come, so that a run cut short still counts. It needs jax with its CUDA plugin, and what `NEEDED` names;
nothing is downloaded. `--rehearse` runs the same code on a CPU at tiny sizes, kernels interpreted.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import tyro

# name -> (module, seconds it may take); in the order in which they run, so what matters most comes first
SECTIONS = {
    "device": ("kernels", 60),
    "checks": ("kernels", 120),
    "attention": ("kernels", 150),
    "decode-attention": ("kernels", 90),
    "decode": ("model", 150),
    "crosscheck": ("model", 120),
    "train": ("model", 240),
    "products": ("kernels", 60),
    "experts": ("kernels", 60),
    "default-model": ("model", 150),
    "tiles": ("kernels", 150),
    "group-tiles": ("kernels", 150),
    "profile": ("model", 90),
}
NEEDED = ("flax", "grain", "hypothesis", "jinja2", "optax", "orbax", "peft", "safetensors", "torch", "tokenizers",
          "transformers", "tyro")  # fmt: skip
OPTIONAL = ("tiles", "group-tiles", "profile")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measures kernels, decoding and training on a GPU beside PyTorch and cuDNN, and checks the values."""

    out: Path
    """Folder for gpu.jsonl; made if it is not there, and appended to if it is."""
    sections: tuple[str, ...] = tuple(name for name in SECTIONS if name not in OPTIONAL)
    """What to run, in this order: device, checks, attention, decode-attention, decode, crosscheck, train, products,
    experts, default-model; and, run only when they are named, tiles and group-tiles, which look for better tiles of the
    kernels, and profile, which says what a training step spends its time on."""
    seconds: int = 470
    """For all sections together; those that would start later are left out, and said to be."""
    rehearse: bool = False
    """On CPU at tiny sizes, which says that the code runs and nothing about speed."""


def main(argv: list[str]) -> int:
    """Runs the sections one after the other and prints their tables; 1 when a check failed or a section ended early."""
    if argv and argv[0] == "section":  # in a process of its own, started below
        from bench.gpu import measure

        measure.start(argv[1], Path(argv[2]), rehearse=argv[3] == "rehearse")
        module = importlib.import_module(f"bench.gpu.{SECTIONS[argv[1]][0]}")
        getattr(module, argv[1].replace("-", "_"))()
        return 0
    options = tyro.cli(Arguments, args=argv, prog="python -m bench.gpu")
    if unknown := [name for name in options.sections if name not in SECTIONS]:
        print(f"there is no section {', '.join(unknown)}; use some of {', '.join(SECTIONS)}.", file=sys.stderr)
        return 2
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(
            f"{', '.join(missing)} not installed, which some section needs; install, or carry wheels.", file=sys.stderr
        )
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    results, began, good = options.out / "gpu.jsonl", time.monotonic(), True
    environment = dict(os.environ)
    if options.rehearse:
        environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    for name in options.sections:
        left = options.seconds - (time.monotonic() - began)
        limit = min(SECTIONS[name][1], left)
        if limit < 10:
            good = _ended(results, name, f"not run: {options.seconds} s were over") and good
            continue
        command = [sys.executable, "-m", "bench.gpu", "section", name, str(results)]
        command.append("rehearse" if options.rehearse else "measure")
        section_began = time.monotonic()
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status, cut = 1, f"stopped after {limit:.0f} s"
        else:
            cut = f"ended with status {status}, see its messages above"
        if status:
            good = _ended(results, name, cut) and good
        print(f"{name}: {time.monotonic() - section_began:.0f} s", flush=True)
    good = show(results) and good
    return 0 if good else 1


def _ended(results: Path, section: str, why: str) -> bool:
    with results.open("a") as file:
        file.write(json.dumps({"section": section, "failed": why}) + "\n")
    print(f"{section}: {why}", flush=True)
    return False


def show(results: Path) -> bool:
    """Prints the results as one aligned table a section; False if any of them says that it failed."""
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    for section in dict.fromkeys(row.pop("section") for row in (dict(row) for row in rows)):
        here = [{k: v for k, v in row.items() if k != "section"} for row in rows if row["section"] == section]
        print(f"\n{section}")
        for keys in dict.fromkeys(tuple(row) for row in here):
            table = [list(keys)] + [[_cell(row[k]) for k in keys] for row in here if tuple(row) == keys]
            widths = [max(len(line[i]) for line in table) for i in range(len(keys))]
            for line in table:
                print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return not any("failed" in row or row.get("holds") is False for row in rows)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
