"""The process in which programs are compiled: libtpu wants its environment before jax is imported, and may abort.

`python -m aot.worker` reads lines of JSON, {program, mode, cache}, and prints one for each stage and result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import gzip
import hashlib
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # nobody to ask for the machine's TPU
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}

# What a cached artifact was made of besides the lowered program.
FORMAT = 4


def main() -> int:
    os.environ.update(ENVIRONMENT)
    from aot.programs import Program
    from qwen_jax.errors import InputError

    for line in sys.stdin:
        request = json.loads(line)
        program = Program.from_json(request["program"])
        try:
            path = artifact(program, request["mode"], Path(request["cache"]), say)
        except InputError as error:
            print(json.dumps({"refused": str(error)}), flush=True)
        else:
            print(json.dumps({"artifact": str(path)}), flush=True)
    return 0


def say(stage: str) -> None:
    print(json.dumps({"stage": stage}), flush=True)


def artifact(program: Any, mode: str, cache: Path, say: Any) -> Path:
    """Path of the gzipped JSON of what the compiler makes of `program`, from the cache if it has been compiled before.

    mode "full" compiles it; "estimate" asks only, in seconds, how much memory it would take.
    """
    from aot.programs import build_mesh, lower
    from aot.targets import load_target
    from qwen_jax.compiler_options import training_options

    started = time.monotonic()
    target = load_target(program.target)
    say("tracing")
    mesh = build_mesh(program, target.devices)
    lowered = lower(program, mesh)
    versions = {"jaxlib": importlib.metadata.version("jaxlib"), "compiler": target.version}
    options = training_options(target.devices[0].device_kind) if program.step == "train" else {}
    identity = json.dumps([FORMAT, mode, program.target, versions, options], sort_keys=True)
    key = hashlib.sha256((lowered.as_text() + identity).encode()).hexdigest()
    path = cache / f"{key}.json.gz"
    if path.exists():
        return path
    traced = time.monotonic()
    say("compiling")
    result = compile_lowered(lowered, mode, target.platform)
    result |= {
        "versions": versions,
        "lower_seconds": traced - started,
        "compile_seconds": time.monotonic() - traced,
        "coordinates": [list(getattr(device, "coords", (device.id,))) for device in mesh.devices.flat],
        "slices": [getattr(device, "slice_index", 0) for device in mesh.devices.flat],
        "mesh": dict(mesh.shape),
    }
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=cache, suffix=".part", delete=False) as file:
        file.write(gzip.compress(json.dumps(result).encode(), 6))
    os.replace(file.name, path)
    return path


def compile_lowered(lowered: Any, mode: str, platform: str) -> dict[str, Any]:
    """{memory, hlo} of the compiled program, or {out_of_memory} of one that does not fit."""
    import jax

    from aot.memory import parse_out_of_memory, second_copies

    with tempfile.TemporaryDirectory(prefix="qwen-jax-hlo-") as folder:
        options: dict[str, Any] = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "^$"}
        if mode == "estimate":
            options = {"xla_tpu_max_hbm_size_mib": "16"}
        try:
            compiled = lowered.compile(compiler_options=options if platform == "tpu" else None)
        except jax.errors.JaxRuntimeError as error:
            refusal = parse_out_of_memory(str(error))
            if refusal is None:
                raise
            if mode == "full" and not refusal.allocations:
                refusal = _explained(lowered, refusal)
            return {"out_of_memory": dataclasses.asdict(refusal)}
        analysis = compiled.memory_analysis()
        copies = []
        if platform == "tpu" and mode == "full":
            text = _scheduled_hlo(folder)
            copies = [dataclasses.asdict(copy) for copy in second_copies(*_buffers(folder))]
        else:
            text = compiled.as_text()
    memory = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
        "host": analysis.host_temp_size_in_bytes,
    }
    return {"memory": memory, "hlo": text, "second_copies": copies}


def _buffers(folder: str) -> Any:
    """(blocks, module) of the buffer assignment in a folder of dumps."""
    from aot import hlo
    from aot.memory import blocks

    largest = max(glob.glob(f"{folder}/*after_optimizations-buffer-assignment.txt"), key=os.path.getsize)
    module = hlo.parse(Path(largest.replace("-buffer-assignment", "")).read_text())
    return blocks(Path(largest).read_text(), module), module


def _scheduled_hlo(folder: str) -> str:
    # Compiled.as_text() fails on many v5p and v6e programs in jaxlib 0.10
    dumps = glob.glob(f"{folder}/*after_codegen.txt")
    return Path(max(dumps, key=os.path.getsize)).read_text()


def _explained(lowered: Any, refusal: Any) -> Any:
    """A refusal without a list of allocations, with one: the compiler is told to go on and dump what it would do."""
    import jax

    with tempfile.TemporaryDirectory(prefix="qwen-jax-hlo-") as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "^$", "xla_tpu_no_crash_on_oom": "true"}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # it ends in an invalid program in any case
            lowered.compile(compiler_options=options)
        if not glob.glob(f"{folder}/*buffer-assignment.txt"):
            return refusal
        found, _ = _buffers(folder)
        return dataclasses.replace(refusal, allocations=tuple(block.allocation for block in found[:8]))


if __name__ == "__main__":
    sys.exit(main())
