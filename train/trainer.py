"""`qwen-jax train`: one run from its configuration to final weights, read from top to bottom.

The same file runs on one CPU, on several devices, and as several processes on a TPU slice or GPUs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from qwen_jax.errors import CheckFailed, Failure, InputError
from train.config import TrainConfig, experiments, load_experiment

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from qwen_jax.config import ModelConfig
    from qwen_jax.tokenizer import Tokenizer
    from qwen_jax.weights.checkpoint import Checkpoint
    from train.data.loader import DataIterator
    from train.step import Batch, TrainState

PROFILED_STEPS = 3


def main(argv: Sequence[str]) -> int:
    """Runs `qwen-jax train EXPERIMENT [--field value ...]`; 143 after SIGTERM and 130 after Ctrl-C, the state saved.

    A loss that is not finite ends with status 1, a failing disk, data worker or other process with 75.
    """
    if not argv or argv[0] in ("-h", "--help"):
        rows = [f"  {name:24} {summary}" for name, summary in experiments().items()]
        print("usage: qwen-jax train EXPERIMENT|FILE.py [--field value ...]\n\nexperiments:", *rows, sep="\n")
        print("\n`qwen-jax train EXPERIMENT --help` lists the fields and this experiment's values.")
        return 0
    experiment, description = load_experiment(argv[0])
    return train(
        tyro.cli(
            TrainConfig,
            default=experiment,
            args=list(argv[1:]),
            prog=f"qwen-jax train {argv[0]}",
            description=description,
            config=(tyro.conf.AvoidSubcommands,),
        )
    )


def train(config: TrainConfig) -> int:
    """Trains, from the last checkpoint in `config.out` if there is one, and returns an exit status.

    Raises InputError for what cannot be run, CheckFailed for a loss that is not finite, EnvironmentFailed for a disk or
    data that cannot be read or written now. The state is saved before, where there is one.
    """
    import jax
    import numpy as np

    from qwen_jax.sharding import make_mesh
    from qwen_jax.tokenizer import check_tokenizer, load_tokenizer
    from qwen_jax.weights.default_model import cache_folder
    from train.checkpoint import Checkpoints
    from train.data.loader import make_loader
    from train.files import write_whole
    from train.metrics import Display, Recorder, plot, utilisation
    from train.processes import join
    from train.step import abstract_batch, abstract_state, jit_train_step, state_shardings

    # --- processes, model, mesh ---------------------------------------------------------------------------------------
    join(config.processes)
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "programs"))
    is_main = jax.process_index() == 0
    if config.export and config.export.exists():
        raise InputError(f"{config.export} already exists; choose another folder to export to, or remove it first.")
    display = Display(config.steps, config.log_every, show=is_main)
    say = display.say
    base = _base(config)
    model = _architecture(config, base)
    tokenizer = base.tokenizer() if base else load_tokenizer(config.model)
    check_tokenizer(tokenizer, model)
    mesh = make_mesh(config.mesh, model=model)
    rows, length = config.data.batch_size, config.data.sequence_length
    _check_rows(mesh, rows, config.step.accumulate)
    split = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind} ({split})"
    say(f"{model.num_params():,} parameters on {devices}; {rows} rows of {length} tokens a step")

    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        stop = stack.enter_context(_stop_requests())

        # --- data -----------------------------------------------------------------------------------------------------
        feed = Feed(mesh, rows, length)
        data = stack.enter_context(make_loader(config.data, tokenizer, *feed.part))
        evaluate = None
        if config.eval_data:
            eval_feed = Feed(mesh, config.eval_data.batch_size, config.eval_data.sequence_length)
            eval_loader = stack.enter_context(make_loader(config.eval_data, tokenizer, *eval_feed.part))
            evaluate = _evaluation(config, model, mesh, eval_loader, eval_feed)

        # --- compilation, from shapes alone ---------------------------------------------------------------------------
        began = time.perf_counter()
        layout = state_shardings(model, config.optimizer, mesh)
        step_fn = jit_train_step(model, config.optimizer, config.step, config.steps, mesh, rows, length)
        shapes = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract_state(model, config.optimizer),
            layout,
        )
        step_fn = step_fn.lower(shapes, abstract_batch(rows, length)).compile()
        memory = step_fn.memory_analysis()
        needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        say(f"compiled in {time.perf_counter() - began:.0f} s; {needed / 2**30:.2f} GiB a device")

        # --- state: the last checkpoint, or the weights to start from -------------------------------------------------
        run = {"model": model.to_hf(), "moments": config.optimizer.moments, "frozen": list(config.optimizer.frozen)}
        checkpoints = Checkpoints(config.out / "checkpoints", config.keep, say)
        restored = checkpoints.restore(shapes, run)
        if restored:
            state, place = restored
            data.set_state(place)
            say(f"going on from the checkpoint of step {int(state.step)}")
        else:
            state = _initial_state(config, model, base, layout)
        done = int(state.step)
        recorder = Recorder(config.out, done, say) if is_main else None
        if is_main:
            fields = json.dumps(dataclasses.asdict(config), indent=2, default=str)
            write_whole(config.out / "config.json", lambda file: file.write(fields.encode() + b"\n"))

        # --- the loop -------------------------------------------------------------------------------------------------
        display.start(done)
        stack.callback(display.stop)
        place_before, (local, failure) = data.get_state(), _next(data)
        saved, best = done, checkpoints.best_loss()
        clock = time.perf_counter()
        seconds_per_step = 0.0
        while done < config.steps and local is not None:
            if config.profile_at is not None and done == config.profile_at:
                jax.profiler.start_trace(str(config.out / "profile"))
            place = data.get_state()
            state, metrics = step_fn(state, feed(local))
            upcoming, failure = _next(data)  # while the devices work
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if not values.pop("finite"):
                file = config.out / f"not-finite-step-{done + 1}-process-{jax.process_index()}.npz"
                np.savez(file, allow_pickle=False, **local)
                if done > saved:
                    checkpoints.save(state, place_before, run)
                checkpoints.close()
                raise CheckFailed(
                    f"the loss or gradient of step {done + 1} is not finite (loss {values['loss']}); its batch is in "
                    f"{file}, and the weights before it in the checkpoint of step {done}; look at the batch, or lower "
                    "the learning rate, and run the same command again."
                )
            done += 1
            place_before, local = place, upcoming
            now = time.perf_counter()
            seconds, clock = now - clock, now
            values |= {"seconds": seconds, "tokens_per_second": rows * length / seconds}
            if (mfu := utilisation(model, rows, length, seconds)) is not None:
                values["mfu"] = mfu
            seconds_per_step = seconds if not seconds_per_step else 0.9 * seconds_per_step + 0.1 * seconds
            display.show(done, values, (config.steps - done) * seconds_per_step)
            if recorder:
                recorder.record(done, values)
            if config.profile_at is not None and done == min(config.profile_at + PROFILED_STEPS, config.steps):
                jax.profiler.stop_trace()
                say(f"a trace of {done - config.profile_at} steps is in {config.out / 'profile'}")

            last = done == config.steps or (local is None and failure is None)
            eval_loss, is_best = None, False
            if evaluate and (last or done % config.eval_every == 0):
                result = evaluate(state)
                eval_loss = result["eval_loss"]
                if is_best := best is None or eval_loss < best:
                    best = eval_loss
                say(f"step {done}: evaluation loss {eval_loss:.4f}, accuracy {result['eval_accuracy']:.1%}")
                if recorder:
                    recorder.record(done, result)
            signalled = stop(done)
            if last or signalled or failure or is_best or done % config.checkpoint_every == 0:
                checkpoints.save(state, place, run, eval_loss)
                saved = done
            if signalled:
                checkpoints.close()
                say(f"stopped at step {done} by {signalled.name}, which is saved; the same command goes on from there")
                return 128 + signalled
            clock = time.perf_counter()

        if failure:
            checkpoints.close()
            raise failure

        # --- the end --------------------------------------------------------------------------------------------------
        if done < config.steps:
            say(f"the data ended after {done} of {config.steps} steps; more `epochs` would give more")
        checkpoints.close()
        _write_weights(config, model, state, base, tokenizer, say)
        if recorder:
            recorder.close()
            say(f"{recorder.path}, {plot(recorder.path)}")
    return 0


# --- parts ------------------------------------------------------------------------------------------------------------


def _next(data: DataIterator) -> tuple[dict[str, Any] | None, Failure | None]:
    """The next batch, None at the end of the data; or why there is none, said when the state is saved."""
    try:
        return next(data, None), None
    except Failure as failure:
        return None, failure


def _base(config: TrainConfig) -> Checkpoint | None:
    """What `model` names; None where random weights need only its tokenizer and it is a folder with nothing else."""
    from qwen_jax.weights.open import open_checkpoint

    folder = Path(config.model)
    if (config.preset or config.architecture) and folder.is_dir() and not (folder / "config.json").exists():
        return None
    return open_checkpoint(config.model)


def _architecture(config: TrainConfig, base: Checkpoint | None) -> ModelConfig:
    from qwen_jax.presets import load_preset

    if config.preset:
        return load_preset(config.preset)
    if config.architecture:
        return config.architecture
    assert base is not None
    changes = {"rope_theta": config.rope_theta, "max_position_embeddings": config.max_position_embeddings}
    return dataclasses.replace(base.config, **{name: value for name, value in changes.items() if value is not None})


def _check_rows(mesh: Mesh, rows: int, accumulate: int) -> None:
    from qwen_jax.sharding import RULES

    parts = 1
    for axis in RULES.batch:
        parts *= mesh.shape[axis]
    if rows % (parts * accumulate):
        raise InputError(
            f"a batch of {rows} rows cannot be divided among {parts} parts of the mesh ({', '.join(RULES.batch)}) in "
            f"{accumulate} micro-batches; make data.batch_size a multiple of {parts * accumulate}."
        )


class Feed:
    """This process's rows of a batch onto its devices, as its part of the whole batch's arrays."""

    def __init__(self, mesh: Mesh, batch_size: int, length: int) -> None:
        import jax

        from qwen_jax.sharding import activation_sharding

        self._shape = (batch_size, length)
        self._sharding = activation_sharding(mesh, self._shape, "batch", "sequence")
        starts: dict[int, dict[int, int]] = {}  # of each process: first row -> number of rows
        for device, index in self._sharding.devices_indices_map(self._shape).items():
            start, stop, _ = index[0].indices(batch_size)
            starts.setdefault(device.process_index, {})[start] = stop - start
        groups = sorted({tuple(sorted(rows)) for rows in starts.values()})
        mine = starts[jax.process_index()]
        self.part = groups.index(tuple(sorted(mine))), len(groups)
        """Which part of every batch this process reads, of how many; processes with the same rows read the same part"""
        self._offsets, offset = {}, 0
        for start in sorted(mine):
            self._offsets[start] = offset
            offset += mine[start]
        if offset * len(groups) != batch_size:
            raise InputError("this mesh gives some processes more rows than others; choose other mesh axes.")

    def __call__(self, local: dict[str, Any]) -> Batch:
        import jax

        def array(name: str) -> jax.Array:
            def shard(index: Any) -> Any:
                start, stop, _ = index[0].indices(self._shape[0])
                offset = self._offsets[start]
                return local[name][offset : offset + stop - start, index[1]]

            return jax.make_array_from_callback(self._shape, self._sharding, shard)

        return {name: array(name) for name in local}


def _initial_state(config: TrainConfig, model: Any, base: Checkpoint | None, layout: TrainState) -> TrainState:
    import sys

    import jax
    import numpy as np

    from qwen_jax.weights.load import load_params
    from train.step import init_state, new_state

    if config.preset or config.architecture:
        make = jax.jit(lambda key: init_state(model, config.optimizer, key), out_shardings=layout)
        return make(jax.random.key(config.seed))
    assert base is not None
    progress = sys.stderr.isatty() and jax.process_index() == 0
    params = load_params(base, np.float32, layout.params, progress=progress)
    make = jax.jit(lambda params: new_state(params, config.optimizer), out_shardings=layout, donate_argnums=0)
    return make(params)


def _evaluation(
    config: TrainConfig, model: Any, mesh: Mesh, loader: DataIterator, feed: Feed
) -> Callable[[TrainState], dict[str, float]]:
    """The function that measures loss and accuracy on the first `eval_batches` of the evaluation data."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from train.step import make_eval_step, token_means

    eval_step = jax.jit(make_eval_step(model, config.step), out_shardings=NamedSharding(mesh, PartitionSpec()))
    beginning = loader.get_state()

    def evaluate(state: TrainState) -> dict[str, float]:
        loader.set_state(beginning)
        total = None
        for _ in range(config.eval_batches):
            if (local := next(loader, None)) is None:
                break
            sums = eval_step(state.params, feed(local))
            total = sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums)
        means = token_means(jax.device_get(total))
        return {f"eval_{name}": float(value) for name, value in means.items()}

    return evaluate


@contextlib.contextmanager
def _stop_requests() -> Iterator[Callable[[int], signal.Signals | None]]:
    """Yields the function that says, after a step, by which signal the run has been asked to stop, if any.

    SIGTERM is what a scheduler sends before it takes a machine away, perhaps to one process only: then all stop after
    the same step. A second Ctrl-C interrupts at once.
    """
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        yield lambda step: signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None
        return
    received: list[signal.Signals] = []

    def handler(number: int, _: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal.Signals(number))

    # Python lets only the main thread handle signals
    numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield lambda step: received[0] if received else None
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _write_weights(
    config: TrainConfig,
    model: Any,
    state: TrainState,
    base: Checkpoint | None,
    tokenizer: Tokenizer,
    say: Callable[[str], None],
) -> None:
    """OUT/final, float32 in our own form, and the export."""
    import jax
    import ml_dtypes
    import orbax.checkpoint as ocp

    from qwen_jax.weights.export import save_hf, write_config
    from qwen_jax.weights.load import ParamsCheckpoint
    from qwen_jax.weights.open import open_checkpoint

    final = (config.out / "final").absolute()
    # a layer to a chunk: who reads one layer, as the export does, need not read all
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(), state.params)
    chunks["layers"] = jax.tree.map(lambda _: ocp.SaveArgs(shard_axes=(0,)), chunks["layers"])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(final, state.params, save_args=chunks, force=True)
    if jax.process_index() == 0:
        write_config(ParamsCheckpoint(state.params, model, base), final, "float32")
        if base is None:
            tokenizer.save(final)
        say(f"final weights: {final}")
        if config.export:
            save_hf(open_checkpoint(final), config.export, dtype=ml_dtypes.bfloat16, progress=False)
            say(f"exported to {config.export}")
