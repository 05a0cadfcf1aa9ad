"""`qwen-jax train`: one run from its configuration to final weights, read from top to bottom.

The same file runs on one CPU, on several devices, and as several processes on a TPU slice or GPUs.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Sequence

import tyro

from qwen_jax.errors import EnvironmentFailed, InputError
from train.config import TrainConfig, experiments, load_experiment


def main(argv: Sequence[str]) -> int:
    """Runs `qwen-jax train EXPERIMENT [--field value ...]`; 143 after SIGTERM and 130 after Ctrl-C, the state saved.

    A loss that is not finite ends with status 1, a failing disk, device, data worker or other process with 75.
    """
    if not argv or argv[0] in ("-h", "--help"):
        rows = [f"  {name:24} {summary}" for name, summary in experiments().items()]
        print("usage: qwen-jax train EXPERIMENT|FILE.py [--field value ...]\n\nexperiments:", *rows, sep="\n")
        print("\n`qwen-jax train EXPERIMENT --help` lists the fields and this experiment's values.")
        return 0
    experiment, description = load_experiment(argv[0])
    config = tyro.cli(
        TrainConfig,
        default=experiment,
        args=list(argv[1:]),
        prog=f"qwen-jax train {argv[0]}",
        description=description,
        config=(tyro.conf.AvoidSubcommands,),
    )
    import jax

    try:
        return train(config)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0][:200]
        if "RESOURCE_EXHAUSTED" in reason:
            raise InputError(
                f"a device's memory is full ({reason}); use more micro-batches, remat or devices."
            ) from None
        sentence = f"a device or another process failed ({reason}); the same command goes on from the last checkpoint."
        if jax.process_count() == 1:
            raise EnvironmentFailed(sentence) from None
        # JAX would say farewell to the other processes, of which one is gone
        print(f"qwen-jax: {sentence}", file=sys.stderr, flush=True)
        os._exit(EnvironmentFailed.status)


def train(config: TrainConfig) -> int:
    """Trains, from the last checkpoint in `config.out` if there is one, and returns an exit status.

    Raises InputError for what cannot be run, CheckFailed for a loss that is not finite, EnvironmentFailed for a disk or
    data that cannot be read or written now. The state is saved before, where there is one.
    """
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from qwen_jax.local_path import cache_folder
    from qwen_jax.sharding import make_mesh
    from qwen_jax.tokenizer import Tokenizer, check_tokenizer, load_tokenizer
    from train import weights
    from train.batch import check_rows
    from train.checkpoint import Checkpoints
    from train.data.feed import Feed
    from train.data.loader import Batch, DataIterator, make_loader
    from train.files import write_whole
    from train.hooks import Evaluation, Guard, Profiler, Report, Saver, Stop
    from train.loop import Supply, loop
    from train.metrics import Display, Recorder, plot
    from train.processes import gather, join, together
    from train.state import new_state, split
    from train.step import abstract_arguments, jit_train_step, make_eval_step
    from train.watch import SAVING, Watch

    # --- processes, model, mesh ---------------------------------------------------------------------------------------
    began = time.monotonic()
    join(config.processes)
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "programs"))
    is_main = jax.process_index() == 0
    with together():
        weights.check_export(config)
    display = Display(config.steps, config.log_every, show=is_main)
    say = display.say
    with together():
        base = weights.base_of(config)
    model, objective = weights.architecture_of(config, base), config.objective
    mesh = make_mesh(config.mesh, model=model)
    rows, length = config.data.batch_size, config.data.sequence_length
    check_rows(mesh, rows, config.step.accumulate)
    parts = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind} ({parts})"
    say(f"{model.num_params():,} parameters on {devices}; {rows} rows of {length} tokens a step")

    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        watch = stack.enter_context(Watch(config.stop_grace, say))
        checkpoints = stack.enter_context(Checkpoints(config.out / "checkpoints", config.keep, say))

        # --- data, opened while the step is traced --------------------------------------------------------------------
        feed = Feed(objective.batch, mesh, rows, length)
        eval_feed = None
        if config.eval_data:
            eval_feed = Feed(objective.batch, mesh, config.eval_data.batch_size, config.eval_data.sequence_length)

        def open_data() -> tuple[Tokenizer, list[Batch], DataIterator]:
            tokenizer = base.tokenizer() if base else load_tokenizer(config.model)
            check_tokenizer(tokenizer, model)
            eval_batches = []
            if config.eval_data and eval_feed:
                with make_loader(config.eval_data, tokenizer, eval_feed.rows) as loader:
                    eval_batches = list(itertools.islice(loader, config.eval_batches))
            return tokenizer, eval_batches, make_loader(config.data, tokenizer, feed.rows)

        thread = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))
        opening = thread.submit(open_data)

        # --- compilation, from shapes alone, while weights are read ---------------------------------------------------
        roles = None
        if config.adapter.is_used:  # whose base is of any kind, as reading it shows
            watch.enter("reading the weights")
            roles = weights.adapted(config, model, base, mesh)
        watch.enter("tracing the step")
        arguments = abstract_arguments(model, objective, config.optimizer, mesh, rows, length, roles)
        shapes, frozen_shapes = arguments[0], arguments[1] if roles else weights.as_stored(config, base, arguments[1])
        arguments = (shapes, frozen_shapes, *arguments[2:])
        step = jit_train_step(model, objective, config.optimizer, config.step, config.steps, mesh, arguments)
        lowered = step.lower(*arguments)
        watch.enter("opening the data")
        with together():
            tokenizer, eval_batches, data = opening.result()
        stack.enter_context(data)

        def compiled() -> jax.stages.Compiled:
            compile_began = time.perf_counter()
            step = lowered.compile()
            memory = step.memory_analysis()
            needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
            say(f"compiled in {time.perf_counter() - compile_began:.0f} s; {needed / 2**30:.2f} GiB a device")
            return step

        compiling = thread.submit(compiled)

        # --- state: the last checkpoint, or the weights to start from -------------------------------------------------
        watch.enter("reading the weights")
        run = {
            "format": 2,
            "model": model.to_hf(),
            "moments": config.optimizer.moments,
            "frozen": list(config.optimizer.frozen),
            "objective": type(objective).__name__,
            "frozen weights": config.model if jax.tree.leaves(frozen_shapes) else None,
        }
        if roles:
            run["adapter"] = dataclasses.asdict(config.adapter) | {"start": str(config.adapter.start)}
        restored = checkpoints.restore(shapes, run)
        frozen = frozen_shapes
        if not restored or jax.tree.leaves(frozen_shapes):
            initial = roles or weights.initial(config, model, base, mesh)
            trainable, frozen = split(objective, config.optimizer, initial)
            frozen = frozen if roles else weights.as_stored(config, base, frozen)
        if restored:
            state, place = restored
            with together():
                data.set_state(place)
            say(f"going on from the checkpoint of step {int(state.step)}")
        else:
            layout = jax.tree.map(lambda leaf: leaf.sharding, shapes)
            make = jax.jit(lambda leaves: new_state(leaves, config.optimizer), out_shardings=layout, donate_argnums=0)
            state = make(trainable)
        done = int(state.step)
        recorder = None
        with together():
            if is_main:
                recorder = Recorder(config.out, done, say)
                fields = json.dumps(dataclasses.asdict(config), indent=2, default=str)
                write_whole(config.out / "config.json", lambda file: file.write(fields.encode() + b"\n"))

        # --- the loop -------------------------------------------------------------------------------------------------
        report = Report(display, recorder, data, model, rows, length, config.steps, began)
        profiler = evaluation = None
        if config.profile_at is not None:
            profiler = Profiler(config.profile_at, done, config.out / "profile", say)
        if eval_feed and eval_batches:
            everywhere = NamedSharding(mesh, PartitionSpec())
            measure = jax.jit(make_eval_step(model, objective, config.step), out_shardings=everywhere)
            evaluation = Evaluation(
                lambda trainable, rows: measure(trainable, frozen, eval_feed(rows)),
                eval_batches, config.eval_every, report, watch, say,
            )  # fmt: skip
        guard, stop = Guard(config.out, say), Stop(watch)
        saver = Saver(checkpoints, run, config.checkpoint_every, done, data.get_state(), evaluation, report, watch)
        supply = Supply(data, feed, checkpoints.check_lease)
        watch.enter("compiling")
        step = compiling.result()
        display.start(done)
        stack.callback(display.stop)
        state, last = loop(
            lambda state, batch, signals: step(state, frozen, batch, signals),
            state,
            supply,
            [hook for hook in (guard, report, profiler, evaluation, saver, stop) if hook],
            watch,
            mesh,
            config.steps,
        )
        if profiler:
            profiler.close()

        # --- the end --------------------------------------------------------------------------------------------------
        failure = guard.failure(last) or supply.failure
        if evaluation and saver.done > done and not (stop.by or any(gather(failure is not None))):
            evaluation.run(saver.done, state)
        saver.save(state)
        report.close()
        checkpoints.close()
        with together():
            if failure:
                raise failure
        if stop.by:
            say(f"stopped at step {saver.done} by {stop.by.name}, which is saved; the same command goes on from there")
            return 128 + stop.by
        if saver.done < config.steps:
            say(f"the data ended after {saver.done} of {config.steps} steps; more `epochs` would give more")
        watch.enter(SAVING, "of the final weights")
        weights.write(config, model, state, frozen, base, tokenizer, say)
        if recorder:
            say(f"{recorder.path}, {plot(recorder.path)}")
    return 0
