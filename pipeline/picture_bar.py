"""Jobs of packing under a progress bar that counts pictures, on this machine or on Ray."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.pack_config import PackConfig
from pipeline.program import available_cores
from pipeline.ray_jobs import run_jobs_on_ray
from pipeline.worker_pool import Job, Result, run_jobs


@dataclass(frozen=True)
class Bar:
    """A progress bar: where it is drawn, of how many pictures, and how many are done already."""

    console: Console
    total: int
    ahead: int = 0
    take: Callable[[int, Any], None] = lambda _, __: None
    """Told the results."""
    watch: Callable[[], None] = lambda: None
    """Called several times a second."""
    prepare: Callable[[Any], Any] = lambda job: job
    """What is sent to another machine for a job."""


def run_with_bar(
    title: str, work: Callable[[Job], Result], jobs: list[Job], bar: Bar, config: PackConfig
) -> None:
    """Run jobs in parallel processes, with a progress bar that counts pictures."""
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("pictures"),
        TimeRemainingColumn(),
    )
    if not jobs:
        return
    with Progress(*columns, console=bar.console) as progress:
        task = progress.add_task(title, total=bar.total, completed=bar.ahead)

        def show(done: int) -> None:
            progress.update(task, completed=bar.ahead + done * pictures)
            bar.watch()

        # Jobs on Ray do not tell how far they are, only that they are done.
        pictures = (bar.total - bar.ahead) / len(jobs) if config.ray else 1
        workers = config.workers or available_cores()
        if config.ray:
            run_jobs_on_ray(work, jobs, workers, bar.take, show, bar.prepare)
        else:
            run_jobs(work, jobs, workers, bar.take, show)
        progress.update(task, completed=bar.total)
