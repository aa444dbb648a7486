"""Logged values to TensorBoard, Weights & Biases and Trackio, through Accelerate's trackers.

A run keeps its identity and its steps in them when it goes on after an interruption, and no step
has two points: TensorBoard is told to forget what came after the checkpoint; the others cannot
forget, so what they have been given already (``trackers.json`` says what) is not given again. It
lies in the run's folder and not in the checkpoint, which is older than what was tracked after it.
"""

import importlib
import importlib.util
import json
import re
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from rich.console import Console

from eval.run_config import TrainConfig
from model.health import BINS
from pipeline.program import InputError, first_line
from pipeline.settings import flat, to_plain
from pipeline.shard_format import atomic_file

STATE_NAME = "trackers.json"
PROJECT = "mocostream"
TENSORBOARD = "tensorboard"


def require_trackers(names: tuple[str, ...]) -> None:
    """See that the packages of the trackers are installed.

    Raises:
        InputError: naming the first one that is not, and how to have it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"--trackers {name}: the package {name} is not installed: pip install {name}, or "
                "leave it out"
            )


class Tracking:
    """The trackers of a run; a context that ends them. Without trackers it does nothing.

    Args:
        trackers: Accelerate's, started, by name.
        state: file that says what those that cannot forget have been given.
        say: told of a tracker that failed; the run goes on without it.
    """

    def __init__(
        self, trackers: dict[str, GeneralTracker], state: Path, say: Callable[[str], None]
    ) -> None:
        self._trackers = trackers
        self._state = state
        self._say = say
        self._given = read_state(state) if set(trackers) - {TENSORBOARD} else {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name in list(self._trackers):
            self._try(name, lambda tracker, _: tracker.finish())

    def log(self, values: dict[str, Any], step: int) -> None:
        """Numbers as curves, text as text, counts of bins from -1 to 1 as histograms.

        Args:
            values: by name.
            step: steps done. A score that took long may come after values of later steps.
        """
        fresh: dict[str, Any] = {}
        if set(self._trackers) - {TENSORBOARD}:
            steps = self._given["steps"]
            fresh = {name: value for name, value in values.items() if step > steps.get(name, -1)}
            latest = max([step, *steps.values()])
            steps.update(dict.fromkeys(fresh, step))
        for name in list(self._trackers):
            if name == TENSORBOARD:
                self._try(name, lambda tracker, _: to_tensorboard(tracker, values, step))
            elif fresh:
                self._try(name, lambda tracker, n: to_online(tracker, n, fresh, step, latest))
        if fresh:
            write_state(self._state, self._given)

    def _try(self, name: str, call: Callable[[GeneralTracker, str], None]) -> None:
        try:
            call(self._trackers[name], name)
        except Exception as error:  # no tracker is worth a run
            del self._trackers[name]
            self._say(f"--trackers {name} failed, the run goes on without it: {first_line(error)}")


def start_trackers(
    config: TrainConfig,
    output: Path,
    first_step: int,
    console: Console,
    *,
    is_main: bool,
) -> Tracking:
    """Start the trackers of a run with its settings.

    Args:
        config: of the run.
        output: its folder; TensorBoard's and W&B's files lie in it, Trackio has a place of its own.
        first_step: steps done before; what is tracked from there on takes the place of what was.
        console: where failures are said.
        is_main: whether this is the run's main process; the others have no trackers.

    Raises:
        InputError: if one of them does not start, for want of a login for example.
    """
    state = output / STATE_NAME
    settings = to_plain(config)
    started: dict[str, GeneralTracker] = {}
    for name in config.trackers if is_main else ():
        kind = LOGGER_TYPE_TO_CLASS[name]
        try:
            if name == TENSORBOARD:
                purge_step = first_step + 1 if first_step else None
                tracker = kind(TENSORBOARD, output, purge_step=purge_step)
            else:
                if not state.exists():
                    write_state(state, {"id": secrets.token_hex(4), "steps": {}})
                tracker = kind(PROJECT, **online_arguments(name, output, settings))
            tracker.start()
            if name == TENSORBOARD:
                text = json.dumps(settings, indent=1)
                tracker.writer.add_text("settings", f"```\n{text}\n```", first_step)
            elif name == "wandb":
                tracker.tracker.define_metric("knn_top1", step_metric="knn_step")
        except Exception as error:
            raise InputError(
                f"--trackers {name} does not start: {first_line(error)}; put that right (offline: "
                f"WANDB_MODE=offline), or leave {name} out"
            ) from error
        started[name] = tracker
    warn = partial(console.print, style="yellow", soft_wrap=True, markup=False, emoji=False)
    return Tracking(started, state, warn)


def online_arguments(name: str, output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What ``init`` of W&B or Trackio is called with; the same run again after an interruption."""
    identity = read_state(output / STATE_NAME)["id"]
    common = {"config": flat(settings), "resume": "allow"}
    if name == "wandb":
        # Its log of the terminal would be all frames of the live display.
        where = {"dir": str(output), "settings": {"console": "off"}}
        return {**common, **where, "id": identity, "name": output.name}
    return {**common, "name": f"{output.name}-{identity}"}  # a run of Trackio is its name


def to_tensorboard(tracker: GeneralTracker, values: dict[str, Any], step: int) -> None:
    """Write to TensorBoard's files, through to the disk."""
    for name, counts in values.items():
        if isinstance(counts, list):
            middles = (edges()[1:] + edges()[:-1]) / 2
            tracker.tracker.add_histogram_raw(
                name,
                min=-1.0,
                max=1.0,
                num=sum(counts),
                sum=float(np.dot(counts, middles)),
                sum_squares=float(np.dot(counts, middles**2)),
                bucket_limits=edges()[1:].tolist(),
                bucket_counts=counts,
                global_step=step,
            )
    tracker.log({k: v for k, v in values.items() if not isinstance(v, list)}, step=step)


def to_online(
    tracker: GeneralTracker, name: str, values: dict[str, Any], step: int, latest: int
) -> None:
    """Give to W&B or Trackio.

    W&B drops a step below the latest, so a late score goes there with the step that is its own.
    """
    module = importlib.import_module(name)
    shown = {
        key: module.Histogram(np_histogram=(value, edges())) if isinstance(value, list) else value
        for key, value in values.items()
    }
    if "knn_top1" in shown:
        shown["knn_step"] = step
    tracker.log(shown, step=latest if name == "wandb" else step)


def edges() -> Any:
    """Of the bins of a histogram, NumPy float64."""
    return np.linspace(-1, 1, BINS + 1)


def read_state(path: Path) -> dict[str, Any]:
    """The run's identity, and the last step that each name was given with."""
    state: dict[str, Any] = json.loads(path.read_text())
    return state


def is_state(content: bytes) -> bool:
    """Whether that is what ``write_state`` writes."""
    try:
        state = json.loads(content)
        steps = state["steps"].values()
        return re.fullmatch("[0-9a-f]{8}", state["id"]) is not None and all(
            isinstance(step, int) for step in steps
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Whole or not at all."""
    with atomic_file(path) as file:
        file.write(json.dumps(state).encode() + b"\n")
