"""The plan of a run as a table for people and as JSON."""

import json
import os
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from eval.plan import Plan, make_plan
from eval.plan_config import PlanConfig
from eval.roofline import figure
from eval.run_arguments import parse_arguments
from eval.run_check import about_queue
from eval.run_config import TrainConfig
from pipeline.shard_format import atomic_file

Row = tuple[str, str, str]
UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def settings_or_plan(arguments: list[str], about: str) -> TrainConfig:
    """The settings of the run that is asked for; where only its plan is, print that and leave.

    Args:
        arguments: of the command line.
        about: what --help says of the program.

    Raises:
        InputError, EncoderError: naming what is wrong.
        SystemExit: with 0, after the plan.
    """
    asked = parse_arguments(arguments, about)
    if not asked.only_plan:
        return asked.run
    if os.environ.get("RANK", "0") == "0":
        show_plan(asked.run, asked.plan, Console())
    raise SystemExit(0)


def show_plan(run: TrainConfig, settings: PlanConfig, console: Console) -> None:
    """Work out the plan, print it, and write its figures where that is asked for."""
    with console.status("working out the plan"):
        plan = make_plan(run, settings)
    table = Table("", "", "", title=title_of(plan), show_header=False, title_justify="left")
    for rows in (length_rows(plan), memory_rows(plan), storage_rows(plan), time_rows(plan)):
        for row in rows:
            table.add_row(*row)
        table.add_section()
    console.print(table)
    for line in about_queue(run, plan.length.pictures):
        console.print(line, soft_wrap=True, highlight=False)
    if settings.json is not None:
        with atomic_file(settings.json) as file:
            file.write(json.dumps(figures_of(plan), indent=1).encode() + b"\n")


def title_of(plan: Plan) -> str:
    """What is planned."""
    length = plan.length
    share, count = length.batch // length.processes, length.micro_batches
    cut = f" in micro-batches of {share // count}" if count > 1 else ""
    return (
        f"{plan.recipe}: {plan.backbone}, batch {length.batch:,} on {length.processes} x "
        f"{share}{cut}, precision {plan.precision}; nothing was started"
    )


def length_rows(plan: Plan) -> Iterator[Row]:
    """Pictures, steps, parameters."""
    length = plan.length
    yield "pictures", f"{length.pictures:,}", plan.shards or "not packed yet"
    whole = f"{figure(length.epochs)} epochs of {length.steps_per_epoch:,}"
    yield "steps", f"{length.steps:,}", whole
    yield "parameters", f"{plan.parameters:,}", "trained; the key encoder has a copy"


def memory_rows(plan: Plan) -> Iterator[Row]:
    """What one process needs of its GPU."""
    memory = plan.memory
    notes = {
        "weights": "of what is trained",
        "key encoder": "",
        "optimiser": "its state between steps",
        "dictionary": "the keys of earlier steps",
        "views": "two of each picture, float32",
        "activations, gradients": "at their peak in a step",
        "gradient buckets": "of several processes",
    }
    for (name, note), size in zip(notes.items(), vars(memory).values(), strict=True):
        if size:
            yield name, as_size(size), note
    missing = "each process; on top of it CUDA, cuDNN, DALI and gaps: 2 GB and more"
    yield "memory", as_size(memory.total), missing


def storage_rows(plan: Plan) -> Iterator[Row]:
    """What lies on disks."""
    storage = plan.storage
    if storage.shards is not None:
        yield "shards", as_size(storage.shards), "read once in each epoch"
    yield "a checkpoint", as_size(storage.checkpoint), ""
    yield "checkpoints", as_size(storage.checkpoints), "those that stay, and the next one"


def time_rows(plan: Plan) -> Iterator[Row]:
    """Arithmetic, hours, cost."""
    flops, length, time = plan.flops, plan.length, plan.time
    each = f"{figure(flops.forward / 1e9)} forward, {figure(flops.backward / 1e9)} backward"
    yield (
        "GFLOP of a picture",
        figure(flops.total / 1e9),
        f"{each}, {figure(flops.loss / 1e9)} loss",
    )
    whole = flops.total * length.batch * length.steps
    yield "PFLOP of the run", figure(whole / 1e15), ""
    if time is None:
        ways = "give --plan.images-per-s, --plan.roofline or --plan.gpu"
        yield "hours", "unknown", f"no speed is known: {ways}"
        return
    yield "images/s of a process", figure(time.images_per_s), time.source
    about = "" if time.is_measured else "about "
    alike = "as long as several processes are as fast as one each"
    yield "hours", about + figure(time.hours), alike if length.processes > 1 else ""
    yield "GPU hours", about + figure(time.gpu_hours), ""
    if time.cost is not None:
        yield "cost", about + figure(time.cost), "in the currency of --plan.price"


def as_size(size: int) -> str:
    """Bytes in the unit that leaves one to three digits before the point."""
    power = min((len(str(size)) - 1) // 3, len(UNITS) - 1)
    return f"{size / 1000**power:,.3g} {UNITS[power]}"


def figures_of(plan: Plan) -> dict[str, Any]:
    """The plan as nested dicts; sizes in bytes."""
    plain: dict[str, Any] = {}
    for name, value in vars(plan).items():
        plain[name] = dict(vars(value)) if hasattr(value, "__dataclass_fields__") else value
    plain["memory"]["total"] = plan.memory.total
    plain["flops"]["total"] = plan.flops.total
    return plain
