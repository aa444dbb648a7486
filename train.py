"""Pre-train an encoder with Momentum Contrast on a folder of shards.

    accelerate launch train.py RECIPE --data.shards SHARDS --output RUN

RECIPE is a name that --help lists; every number of it is a flag. The same command
with --resume goes on after an interruption. Results per recipe: README.md.

Letters in names: N images on this process, D embedding size, H W pixels.
"""

import signal
import sys
import warnings
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from rich.console import Console
from torch import Tensor

from eval.alarms import Alarms, settled_step
from eval.hardware_watch import watch_hardware
from eval.health_watch import HealthWatch
from eval.lasting_output import lasting
from eval.meter import Meter, Totals
from eval.online_knn import OnlineKnn
from eval.plan_report import settings_or_plan
from eval.run_check import check, introduce, length_in_steps, require_output
from eval.run_config import TrainConfig
from eval.run_end import finish_together
from eval.run_report import RunReport
from eval.run_start import mirror_of, open_run, refuse_uncopied
from eval.save_notes import say_not_saved, say_waited
from eval.skipped_steps import report_skipped
from eval.step_log import StepLog
from eval.tracking import Tracking, start_trackers
from eval.weights_source import start_from, starting_weights
from model.checkpoint import CheckpointError
from model.compiling import compile_encoders
from model.dictionary import Dictionary
from model.encoder import EncoderError
from model.gradient_sum import sum_in_rank_order
from model.mechanism import ENCODERS, chance_loss, loss_scale, make_dictionary
from model.meeting import meet
from model.micro_batches import MicroBatches
from model.moco import MoCo, QueryEncoder
from model.network_shape import WeightsError
from model.optimiser import make_optimiser
from model.run_state import RunState
from model.saving import Saver
from model.schedule import lr_at, momentum_at
from model.step_guard import StepGuard
from model.stopping import Agreement, StopRequest, exit_code, may_be_started_again
from model.watchdog import Watchdog
from pipeline.data_config import cpu_threads
from pipeline.loader import PairBatch, PairLoader
from pipeline.program import run_program
from pipeline.settings import to_plain


@may_be_started_again()
def main() -> None:
    """One run, from the command line to its last checkpoint."""
    config = settings_or_plan(sys.argv[1:], __doc__ or "")  # --plan ends here
    output = require_output(config)
    manifest_sha256 = check(config)
    # It passes DDP a name that torch 2.15 replaces, which older ones do not know.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    meet(config.hang_seconds)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # else several processes on CPUs would train each alone
        mixed_precision=config.precision,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if accelerator.device.type == "cpu":  # accelerate launch leaves one thread to each process
        torch.set_num_threads(cpu_threads(config.data))
    console = Console(file=lasting(sys.stdout), quiet=not accelerator.is_main_process)
    found = open_run(config, output, manifest_sha256, accelerator, console)
    first_step, is_main = found.step if found else 0, accelerator.is_main_process

    # First the loader: it reads ahead while the model is built.
    with (
        PairLoader(
            config.data,
            global_batch=config.batch,
            seed=config.seed,
            device=accelerator.device,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            start_step=first_step,
            half=accelerator.device.type == "cuda" and config.precision != "no",
            quarantine_path=quarantine_log(output, accelerator.process_index),
        ) as loader,
        start_trackers(config, output, first_step, console, is_main=is_main) as tracking,
    ):
        torch.manual_seed(config.seed)
        moco = ENCODERS[config.moco.mechanism](
            config.encoder, config.moco, config.batch, config.seed, config.data.image_px,
            config.micro_batch,
        )  # fmt: skip
        if not found and (start := starting_weights(config.encoder, config.data.image_px)):
            start_from(moco, start)
        prepare_encoders(moco, config, console)
        samples = loader.order.samples
        dictionary = make_dictionary(config.moco, config.encoder.dim, samples, config.seed)
        dictionary = dictionary.to(accelerator.device)
        wrapped = accelerator.prepare(moco)  # the optimiser needs no wrapper, the guard steps it
        sum_in_rank_order(wrapped)
        optimizer = make_optimiser(config.optimiser, moco.parameters())
        state = RunState(moco, dictionary, optimizer, accelerator.scaler)
        if found:
            state.load(found)
        total_steps = length_in_steps(config, loader.order)
        for line in introduce(config, accelerator, loader, total_steps, found):
            console.print(line, soft_wrap=True, highlight=False, markup=False, emoji=False)
        saver = Saver(
            state,
            output,
            keep=config.keep,
            minutes=config.save_minutes,
            failed=partial(say_not_saved, console),
            waited=partial(say_waited, console),
            copies=mirror_of(config, found, console),
        )
        skipped = found.state.get("skipped_steps", 0) if found else 0
        guard = StepGuard(moco, accelerator.scaler, skipped)
        watches = (watch_of(config, accelerator), guard)
        rest = (saver, *watches, Totals(**found.state.get("totals", {})) if found else Totals())
        run = Run(config, output, accelerator, loader, wrapped, dictionary, optimizer, *rest)
        train(run, tracking, first_step=first_step, total_steps=total_steps, console=console)
    accelerator.end_training()


@dataclass(frozen=True)
class Run:
    """What the loop works with."""

    config: TrainConfig
    output: Path
    accelerator: Accelerator
    loader: PairLoader
    moco: torch.nn.Module
    dictionary: Dictionary
    optimizer: torch.optim.Optimizer
    saver: Saver
    health: HealthWatch
    guard: StepGuard
    before: Totals = field(default_factory=Totals)

    @cached_property
    def encoders(self) -> QueryEncoder:
        """Without the data-parallel wrapper; kept, since to ask for it takes 0.4 ms."""
        return self.accelerator.unwrap_model(self.moco)  # type: ignore[no-any-return]

    @cached_property
    def passes(self) -> MicroBatches:
        """Forward and backward passes of a step."""
        calls = (self.accelerator.backward, self.accelerator.autocast)
        scales = (self.config.moco.temperature, loss_scale(self.config.moco))
        return MicroBatches(self.moco, self.encoders, self.dictionary, *scales, *calls)


def train(
    run: Run, tracking: Tracking, *, first_step: int, total_steps: int, console: Console
) -> None:
    """The loop: from ``first_step`` steps done to ``total_steps``, or to a signal."""
    config = run.config
    stop, agreement = StopRequest(), Agreement(2)
    meter = Meter(
        config.batch, run.loader.figures, run.before, watch_hardware(config, run.accelerator).values
    )
    report = open_report(run, tracking, first_step, total_steps, console)
    step, stopped_by, rank = first_step, 0, run.accelerator.process_index
    samples, skipped = (StepLog(run.output, name, rank) for name in ("samples", "skipped"))
    watchdog = Watchdog(run.output / f"hang-{rank}.txt", config.hang_seconds)
    judge = open_judge(run, report)
    tell_skipped = partial(report_skipped, run.guard, report, skipped, config.max_skipped)
    with run.saver, report, samples, skipped, watchdog, judge:
        while step < total_steps and not stopped_by:
            with meter.waiting_for_data():
                batch = next(run.loader)
            lr = set_lr(run, step, total_steps)
            set_momentum(run, step, total_steps)
            is_last = step + 1 == total_steps
            is_logged = is_due(step + 1, config.log_every) or is_last
            loss, accuracy = train_step(run, batch)
            step += 1
            watchdog.beat()
            report.advance(step)
            if config.log_samples:
                samples.write(step, batch.sample_N)
            tell_skipped(wait=is_logged)
            if is_logged and not run.guard.in_a_row:
                values = reduced(run.accelerator, loss=loss, pretext_accuracy=accuracy)
                report.steps(step, values | meter.read() | {"learning_rate": lr})
                report_health(run, report, step)
            stopped_by, save_wanted = agreement.on(stop.signal, run.saver.is_wanted())
            with meter.paused():
                if is_due(step, config.save_every) or is_last or stopped_by or save_wanted:
                    tell_skipped(wait=True)
                    run.saver.save(step, identity(run, meter))
                judge.after(step, is_last=is_last)
        with watchdog.paused():  # a score may take long, and a copy
            judge.finish(agreement, lambda: stopped_by or stop.signal)
            report.finish()
            finish_together(agreement, run.saver.finish)
    say_the_end(run, step, total_steps, stopped_by, console)


def say_the_end(run: Run, step: int, total_steps: int, stopped_by: int, console: Console) -> None:
    """Say how the loop ended, and leave with the code for it where that was not the end."""
    say_bad_samples(run, console)
    if stopped_by and step < total_steps:
        console.print(
            f"stopped by {signal.Signals(stopped_by).name} after step {step} of {total_steps} and "
            "saved; the same command with --resume goes on from there",
            soft_wrap=True,
        )
        sys.exit(exit_code(stopped_by))
    line = f"done: {step} steps, checkpoints and curve in {run.output}"
    console.print(line, soft_wrap=True, markup=False, emoji=False)
    refuse_uncopied(run.config, run.saver.uncopied)


def train_step(run: Run, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of the paper, in its order; loss and pretext accuracy stay on the device."""
    run.guard.begin()
    layout = layout_of(run.config)
    views = [view.to(memory_format=layout) for view in (batch.query_N3HW, batch.key_N3HW)]
    look = partial(
        run.health.look,
        batch.step,
        dictionary=run.dictionary,
        sample_N=batch.sample_N,
        labels=batch.label_N,
    )
    loss, accuracy = run.passes.run(views, batch.sample_N, batch.step, look)
    run.dictionary.settle()
    run.guard.step(run.optimizer, batch.step + 1, batch.sample_N)
    run.optimizer.zero_grad()
    return loss, accuracy


def set_lr(run: Run, step: int, total_steps: int) -> float:
    """Give the optimiser its learning rate of a step, and return it."""
    config, epoch_steps = run.config, run.loader.order.steps_per_epoch
    lr = lr_at(config.optimiser, step, total_steps, epoch_steps, config.batch)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    return lr


def layout_of(config: TrainConfig) -> torch.memory_format:
    """How weights and views lie in memory; ``contiguous_format`` leaves a view as it is."""
    return torch.channels_last if config.channels_last else torch.contiguous_format


def prepare_encoders(moco: torch.nn.Module, config: TrainConfig, console: Console) -> None:
    """Memory layout and compiling, as the settings ask for, in place."""
    moco.to(memory_format=layout_of(config))
    if config.compile:
        compile_encoders(moco, partial(console.print, style="yellow", markup=False, emoji=False))


def set_momentum(run: Run, step: int, total_steps: int) -> None:
    """Give the key encoder, where there is one, its momentum of a step."""
    moco, config = run.encoders, run.config.moco
    if isinstance(moco, MoCo):
        moco.momentum = momentum_at(config.momentum, step, total_steps, config.momentum_schedule)


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return step % every == 0


def say_bad_samples(run: Run, console: Console) -> None:
    """Tell of samples that this process could not use."""
    if count := run.loader.quarantine.bad:
        log = quarantine_log(run.output, run.accelerator.process_index)
        line = (
            f"note: stand-ins took the place of {count} samples that could not be used; see {log}"
        )
        console.print(line, soft_wrap=True, markup=False, emoji=False)


def quarantine_log(output: Path, rank: int) -> Path:
    """Where a process writes which samples it could not use, and why."""
    return output / f"quarantine-{rank}.jsonl"


def reduced(accelerator: Accelerator, **values: Tensor) -> dict[str, float]:
    """Means over all processes, on the host."""
    return {name: float(accelerator.reduce(value, "mean")) for name, value in values.items()}


def watch_of(config: TrainConfig, accelerator: Accelerator) -> HealthWatch:
    """Looks at the dictionary on the main process, at steps that are logged."""
    every = config.health_every * config.log_every if accelerator.is_main_process else 0
    return HealthWatch(every, config.batch, accelerator.num_processes)


def alarms_of(run: Run) -> Alarms:
    """What watches over the figures of this run."""
    config, order = run.config, run.loader.order
    queue = config.moco.queue if config.moco.mechanism == "queue" else 0
    settled = settled_step(queue, config.batch, order.steps_per_epoch)
    chance = chance_loss(config.moco, run.dictionary.candidates(config.batch))
    return Alarms(chance, queue, order.samples, settled)


def report_health(run: Run, report: RunReport, step: int) -> None:
    """What the last look at the dictionary found, if it was since the last report."""
    found = run.health.read(run.encoders)
    if found is not None:
        report.health(step, found)


def open_judge(run: Run, report: RunReport) -> OnlineKnn:
    """What scores the query encoder meanwhile, on the main process."""
    device, is_judge = run.accelerator.device, run.accelerator.is_main_process
    backbone = run.encoders.encoder_q.backbone
    return OnlineKnn(run.config, backbone, device, report, is_judge=is_judge)


def identity(run: Run, meter: Meter) -> dict[str, Any]:
    """What a checkpoint says about its run: settings, totals, which pictures in which order."""
    order = run.loader.order
    return {
        "config": to_plain(run.config),
        "skipped_steps": run.guard.skipped,
        "totals": vars(meter.totals()),
        "data": {
            "manifest_sha256": run.loader.store.manifest.sha256,
            "samples": order.samples,
            "lanes": order.lanes,
            "window": order.window,
        },
    }


def open_report(
    run: Run, tracking: Tracking, first_step: int, total_steps: int, console: Console
) -> RunReport:
    """The report of this process: only the main one writes."""
    accelerator = run.accelerator
    return RunReport(
        run.output if accelerator.is_main_process else None,
        f"{run.config.recipe} on {run.config.data.shards}",
        total_steps=total_steps,
        first_step=first_step,
        track=tracking.log,
        alarms=alarms_of(run),
        console=console,
    )


if __name__ == "__main__":
    run_program(main, (CheckpointError, EncoderError, WeightsError))
