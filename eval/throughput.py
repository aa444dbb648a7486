"""The data roofline of a machine: how fast is each part of a run, and which one limits it?

    python eval/throughput.py RECIPE --data.shards SHARDS --output roofline.png

Recipe and flags are train.py's; nothing is trained. Reading, decoding, views and the model are
timed alone, then the loader, then loader and model together, in turns. --output is the picture.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a script: import from the repository root, not from eval/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from accelerate import Accelerator
from rich.console import Console
from rich.progress import track
from rich.table import Table

from eval.roofline import Judgement, Setting, Speed, advise, draw, figure, hours, judge, unsteady
from eval.run_arguments import WithRun, parse_with_recipe
from eval.run_config import TrainConfig
from model.encoder import EncoderError
from model.mechanism import ENCODERS, loss_scale, make_dictionary
from model.micro_batches import MicroBatches
from model.moco import count_micro_batches, groups_per_process
from model.optimiser import make_optimiser
from model.step_guard import StepGuard
from pipeline.data_config import cpu_threads
from pipeline.loader import READ_AHEAD_BATCHES, PairBatch, PairLoader
from pipeline.program import InputError, available_cores, run_program
from pipeline.shard_format import atomic_file
from pipeline.stage_probes import Probe, decode_probe, read_probe, resident, views_probe

# What lies ready in queues when nothing was asked for is no measure of the speed.
QUEUED_BATCHES = READ_AHEAD_BATCHES + 3
WARM_UP_RUNS = 3
TITLES = {
    "read": "read (one thread)",
    "decode": "decode",
    "views": "views",
    "model": "model",
    "loader": "read, decode, views",
    "together": "all together",
}


@dataclass(frozen=True, kw_only=True)
class ThroughputConfig(WithRun):
    """What is timed, for how long."""

    json: Path | None = None
    """File for the figures."""
    rounds: int = 3
    """Rounds; in each one every part has its turn."""
    seconds: float = 2.0
    """At least so long is each part timed in each round."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise InputError(f"--rounds {self.rounds}: give a number of at least 1")
        if not 0 < self.seconds <= 3600:
            raise InputError(f"--seconds {self.seconds}: give a number above 0, at most 3600")
        for flag, path, ending in (("output", self.run.output, ".png"), ("json", self.json, "")):
            if path is None:
                continue
            if path.is_dir() or (ending and path.suffix.lower() != ending):
                raise InputError(f"--{flag} {path}: give a file{f' NAME{ending}' * bool(ending)}")
            if not path.absolute().parent.is_dir():
                raise InputError(f"--{flag} {path}: its folder does not exist, make it first")


class TrainingStep:
    """What ``train.py`` does with a batch, on one process."""

    def __init__(self, config: TrainConfig, samples: int, accelerator: Accelerator) -> None:
        torch.manual_seed(config.seed)
        moco = ENCODERS[config.moco.mechanism](
            config.encoder, config.moco, config.batch, config.seed, config.data.image_px,
            config.micro_batch,
        )  # fmt: skip
        dictionary = make_dictionary(config.moco, config.encoder.dim, samples, config.seed)
        wrapped = accelerator.prepare(moco)
        self._optimizer = make_optimiser(config.optimiser, moco.parameters())
        self._guard = StepGuard(moco, accelerator.scaler)
        self._passes = MicroBatches(
            wrapped,
            moco,
            dictionary.to(accelerator.device),
            config.moco.temperature,
            loss_scale(config.moco),
            accelerator.backward,
            accelerator.autocast,
        )

    def __call__(self, batch: PairBatch) -> float:
        """Forward, backward, update; gives the loss."""
        self._guard.begin()
        views = (batch.query_N3HW, batch.key_N3HW)
        loss, _ = self._passes.run(views, batch.sample_N, batch.step)
        self._guard.step(self._optimizer, batch.step + 1, batch.sample_N)
        self._guard.left_out(wait=False)
        self._optimizer.zero_grad()
        return float(loss)


def timed(probe: Probe, seconds: float) -> float:
    """Images per second of at least one run and so many seconds, after warming up.

    The first steps of a network after something else ran are slower, on a CPU by many times.
    """
    started = time.perf_counter()
    for _ in range(WARM_UP_RUNS):
        probe.run()
        if time.perf_counter() - started > seconds:
            break
    _synchronise()
    started = time.perf_counter()
    runs = 0
    while runs == 0 or time.perf_counter() - started < seconds:
        probe.run()
        runs += 1
    _synchronise()
    return runs * probe.images / (time.perf_counter() - started)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def all_probes(
    config: TrainConfig, loader: PairLoader, accelerator: Accelerator
) -> Iterator[dict[str, Probe]]:
    """What is timed, by its name, in the order of ``TITLES``."""
    device = accelerator.device
    step = TrainingStep(config, loader.order.samples, accelerator)
    pictures = resident(loader.plan(0))
    first = next(loader)
    views_N3HW = (first.query_N3HW.clone(), first.key_N3HW.clone())  # the loader's are lent
    batch = PairBatch(*views_N3HW, first.step, first.sample_N, first.label_N, 0)
    images = len(batch.sample_N)
    with (
        decode_probe(config.data, pictures, device) as decoding,
        views_probe(config.data, pictures, device, half=uses_half(config, device)) as views,
    ):
        yield {
            "read": read_probe(loader),
            "decode": decoding,
            "views": views,
            "model": Probe(lambda: step(batch), images),
            "loader": Probe(lambda: next(loader), images),
            "together": Probe(lambda: step(next(loader)), images),
        }


def uses_half(config: TrainConfig, device: torch.device) -> bool:
    """Whether the views are float16, as in ``train.py``."""
    return device.type == "cuda" and config.precision != "no"


def measure(
    probes: dict[str, Probe], rounds: int, seconds: float, console: Console
) -> dict[str, Speed]:
    """Time all parts in turns, so that what else happens on the machine meets them alike."""
    for probe in probes.values():  # compiles kernels, fills pipelines
        probe.run()
    found: dict[str, list[float]] = {name: [] for name in probes}
    turns = [name for _ in range(rounds) for name in probes]
    for name in track(turns, "timing", console=console, transient=True):
        if name in ("loader", "together"):
            for _ in range(QUEUED_BATCHES):
                probes["loader"].run()
        found[name].append(timed(probes[name], seconds))
    return {name: Speed(tuple(speeds)) for name, speeds in found.items()}


def setting_of(config: TrainConfig, device: torch.device, loader: PairLoader) -> Setting:
    """What the speeds are judged by."""
    sizes = loader.plan(0).size_px_N2
    return Setting(
        device=device.type,
        cores=available_cores(),
        threads=cpu_threads(config.data),
        precision=config.precision,
        image_px=config.data.image_px,
        shorter_px=float(sizes.min(axis=1).mean()),
        is_remote=loader.store.is_remote,
    )


def check(config: TrainConfig) -> None:
    """See that the settings fit one process on this machine.

    Raises:
        InputError: naming what does not.
    """
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise InputError("--precision fp16 needs a GPU, none is there: give bf16 or no")
    try:
        groups_per_process(config.moco, config.batch, 1)
        count_micro_batches(config.moco, config.batch, 1, config.micro_batch)
    except ValueError as error:
        raise InputError(str(error)) from error


def images_of(config: TrainConfig, loader: PairLoader) -> int:
    """Pictures that the whole run sees."""
    steps = config.steps or round(config.epochs * loader.order.steps_per_epoch)
    return steps * config.batch


def print_report(
    console: Console, speeds: dict[str, Speed], found: Judgement, advice: list[str], length: str
) -> None:
    """The table, what limits, what to change, how long the run takes."""
    table = Table("part", "images/s", "range", "share of an image's time")
    for name, speed in speeds.items():
        style = "red" if name == found.limit else ""
        share = f"{found.share[name]:.1%}" if name in found.share else ""
        span = f"{figure(speed.low)} to {figure(speed.high)}"
        table.add_row(TITLES[name], figure(speed.median), span, share, style=style)
    console.print(table)
    together = speeds["together"].median
    lines = [
        f"{found.limit} limits: alone it is {figure(found.factor)} times slower than the next part",
        f"the parts could reach {figure(found.possible)} images/s together and reach "
        f"{figure(together)}; if {found.limit} cost nothing, they could reach "
        f"{figure(found.without_limit)}",
        *(f"to change: {line}" for line in advice),
        *(
            f"note: the rounds of {TITLES[name]!r} differ more than twofold, something else runs "
            "here: repeat on an idle machine"
            for name in unsteady(speeds)
        ),
        length,
    ]
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False, emoji=False)


def main() -> None:
    """Parse the command line, measure, judge, write."""
    config = parse_with_recipe(ThroughputConfig, sys.argv[1:], __doc__ or "")
    run, console = config.run, Console()
    check(run)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=run.precision)
    device = accelerator.device
    if device.type == "cpu":
        torch.set_num_threads(cpu_threads(run.data))
    half = uses_half(run, device)
    with PairLoader(
        run.data, global_batch=run.batch, seed=run.seed, device=device, half=half
    ) as loader:
        setting = setting_of(run, device, loader)
        images = images_of(run, loader)
        with all_probes(run, loader, accelerator) as probes:
            speeds = measure(probes, config.rounds, config.seconds, console)
        samples = loader.order.samples
    medians = {name: speed.median for name, speed in speeds.items()}
    found = judge(medians, setting)
    advice = advise(found, medians["together"], setting)
    hours_whole = hours(images, medians["together"])
    what = f"{run.recipe}, {run.encoder.backbone}, batch {run.batch}, on one {device.type}"
    length = (
        f"{what}: {images:,} images of a set of {samples:,} take {hours_whole:,.3g} hours at that "
        "speed"
    )
    print_report(console, speeds, found, advice, length)
    if run.output is not None:
        with atomic_file(run.output) as file:
            bars = {TITLES[name]: speed for name, speed in speeds.items()}
            title = f"{what}: {found.limit} limits, {hours_whole:,.3g} hours"
            draw(bars, TITLES[found.limit], title, file)
    if config.json is not None:
        figures: dict[str, Any] = {
            "images_per_second": {
                n: {"median": s.median, "rounds": s.rounds} for n, s in speeds.items()
            },
            "judgement": vars(found),
            "advice": advice,
            "setting": vars(setting),
            "recipe": run.recipe,
            "batch": run.batch,
            "samples": samples,
            "hours": hours_whole,
        }
        with atomic_file(config.json) as file:
            file.write(json.dumps(figures, indent=1).encode() + b"\n")


if __name__ == "__main__":
    run_program(main, (EncoderError,))
