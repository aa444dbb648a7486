"""The jobs of ``worker_pool`` on a Ray cluster: same jobs, same bytes, more machines.

The cluster is that of ``RAY_ADDRESS``, else one is started on this machine. Sources must have the
same paths on all machines (a shared file system, or URLs), and so must this repository, and the
output where it is a folder.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.program import InputError
from pipeline.worker_pool import Job, Result

ROOT = Path(__file__).resolve().parents[1]
POLL_S = 0.5
AHEAD = 2  # jobs that are sent for each core, so that none waits for the next
RETRIES = 3  # of a job whose machine is lost


def run_jobs_on_ray(
    work: Callable[[Job], Result],
    jobs: Sequence[Job],
    workers: int,
    finished: Callable[[int, Result], None],
    progress: Callable[[int], None],
    prepare: Callable[[Job], Job] = lambda job: job,
) -> None:
    """Run ``work`` on every job; the first failure stops the others and is raised.

    Args:
        work: importable by name on every machine.
        jobs: at least one.
        workers: most processes at once where a cluster is started here.
        finished: told the number of a job and its result, as they end.
        progress: told the number of finished jobs.
        prepare: what is sent for a job; called shortly before it runs, as it may be large.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would call home
    try:
        import ray  # takes a second; optional
    except ImportError:
        raise InputError("--ray needs the extra 'ray': pip install 'ray>=2.40'") from None
    address = os.environ.get("RAY_ADDRESS")
    ray.init(
        address=address,
        num_cpus=None if address else workers,
        include_dashboard=None if address else False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    try:
        remote = ray.remote(num_cpus=1, max_retries=RETRIES)(work)
        left = deque(enumerate(jobs))
        waiting: dict[Any, int] = {}
        done = 0
        while left or waiting:
            cores = int(ray.cluster_resources().get("CPU", 1))  # machines may come and go
            while left and len(waiting) < AHEAD * cores:
                number, job = left.popleft()
                waiting[remote.remote(prepare(job))] = number
            ended, _ = ray.wait(list(waiting), timeout=POLL_S)
            for reference in ended:
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                finished(waiting.pop(reference), result)
                done += 1
            progress(done)
    finally:
        ray.shutdown()
