"""What trackers get: names, steps, settings; a resume without double points; failures."""

import dataclasses
import io
import itertools
import json
import sys

import pytest
from accelerate import PartialState
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eval.recipes import RECIPES
from eval.tracking import require_trackers, start_trackers
from pipeline.program import InputError

# Stands for W&B and for Trackio: writes down how it is called.
FAKE = """
import json, pathlib
CALLS = pathlib.Path(__file__).with_name(__name__ + ".jsonl")

def note(what, **rest):
    with CALLS.open("a") as file:
        file.write(json.dumps({"call": what, **rest}) + chr(10))

class Histogram:
    def __init__(self, np_histogram):
        self.counts, self.edges = np_histogram

class Run:
    def define_metric(self, name, step_metric):
        note("define_metric", name=name, by=step_metric)
    def log(self, values, step):
        if "boom" in values:
            raise ConnectionError("no route to host")
        shown = {k: sum(v.counts) if isinstance(v, Histogram) else v for k, v in values.items()}
        note("log", values=shown, step=step)
    def finish(self):
        note("finish")

def init(**arguments):
    note("init", **arguments)
    return Run()
"""


@pytest.fixture(autouse=True)
def accelerate_has_begun():
    """As in a run, whose Accelerator is there before its trackers; they ask it who is the first."""
    PartialState()


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """``fakes(name)`` gives the calls of a package so far; both are installed."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for name in ("wandb", "trackio"):
        (folder / f"{name}.py").write_text(FAKE)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder)

    def calls(name):
        return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]

    yield calls
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)


def tracking(run, *names, first_step=0, out=None, is_main=True):
    run.mkdir(exist_ok=True)
    config = dataclasses.replace(RECIPES["demo"], trackers=names, batch=77)
    console = Console(file=out or io.StringIO())
    return start_trackers(config, run, first_step, console, is_main=is_main)


def points(calls, name):
    logs = [call for call in calls if call["call"] == "log"]
    return [(call["step"], call["values"][name]) for call in logs if name in call["values"]]


def test_tensorboard_gets_curves_histograms_text_and_settings(tmp_path):
    counts = [0] * 38 + [3, 1]
    with tracking(tmp_path / "run", "tensorboard") as trackers:
        trackers.log({"loss": 1.5, "positive_counts": counts}, 7)
        trackers.log({"alarm": "collapse"}, 8)
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(7, 1.5)]
    (histogram,) = found.Histograms("positive_counts")
    value = histogram.histogram_value
    assert (histogram.step, value.num) == (7, 4)
    assert value.sum == pytest.approx(3 * 0.925 + 0.975)
    assert list(itertools.compress(value.bucket_limit, value.bucket)) == pytest.approx([0.95, 1])
    texts = {tag: found.Tensors(tag)[0].tensor_proto for tag in found.Tags()["tensors"]}
    assert any("alarm" in tag for tag in texts)
    (settings,) = (text for tag, text in texts.items() if "settings" in tag)
    assert b'"batch": 77' in settings.string_val[0]
    assert not (tmp_path / "run" / "trackers.json").exists()


def test_a_resumed_run_has_one_point_for_each_step_in_tensorboard(tmp_path):
    for first_step, value in ((0, 1.0), (10, 2.0)):  # killed after 12 steps, saved after 10
        with tracking(tmp_path, "tensorboard", first_step=first_step) as trackers:
            for step in range(first_step + 1, first_step + 13):
                trackers.log({"loss": value}, step)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(e.step, e.value) for e in found] == [
        (step, 1.0 if step <= 10 else 2.0) for step in range(1, 23)
    ]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_is_the_same_one_without_double_points(name, fakes, tmp_path):
    run = tmp_path / "my run"
    with tracking(run, name) as trackers:
        for step in range(1, 13):
            trackers.log({"loss": float(step)}, step)
    with tracking(run, name, first_step=10) as trackers:
        for step in range(11, 15):
            trackers.log({"loss": float(step)}, step)
    calls = fakes(name)
    assert points(calls, "loss") == [(step, float(step)) for step in range(1, 15)]
    first, second = (call for call in calls if call["call"] == "init")
    assert first == second
    assert (first["project"], first["resume"], first["config"]["batch"]) == (
        "mocostream",
        "allow",
        77,
    )
    assert first["config"]["data.views"] == RECIPES["demo"].data.views
    assert "my run" in first["name"]
    assert [call["call"] for call in calls].count("finish") == 2


def test_a_score_that_comes_late_keeps_its_step(fakes, tmp_path):
    with tracking(tmp_path, "wandb", "trackio", "tensorboard") as trackers:
        trackers.log({"loss": 1.0}, 9)
        trackers.log({"knn_top1": 0.5}, 4)  # W&B would drop step 4 now
    wandb, trackio = fakes("wandb"), fakes("trackio")
    assert {"call": "define_metric", "name": "knn_top1", "by": "knn_step"} in wandb
    assert points(wandb, "knn_top1") == [(9, 0.5)] and points(wandb, "knn_step") == [(9, 4)]
    assert points(trackio, "knn_top1") == [(4, 0.5)]
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("knn_top1")
    assert [e.step for e in found] == [4]


def test_bins_become_histograms(fakes, tmp_path):
    with tracking(tmp_path, "wandb", "trackio") as trackers:
        trackers.log({"positive_counts": [1] * 40}, 1)
    assert points(fakes("wandb"), "positive_counts") == [(1, 40)]
    assert points(fakes("trackio"), "positive_counts") == [(1, 40)]


def test_two_runs_of_one_name_are_two_runs(fakes, tmp_path):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        with tracking(tmp_path / place / "run", "wandb", "trackio"):
            pass
    ids = {call["id"] for call in fakes("wandb") if call["call"] == "init"}
    names = {call["name"] for call in fakes("trackio") if call["call"] == "init"}
    assert len(ids) == len(names) == 2


def test_a_tracker_that_fails_is_said_once_and_left_out(fakes, tmp_path):
    out = io.StringIO()
    with tracking(tmp_path, "wandb", "trackio", out=out) as trackers:
        trackers.log({"boom": 1.0}, 1)
        trackers.log({"loss": 1.0}, 2)
    lines = out.getvalue().splitlines()
    assert lines == [
        f"--trackers {name} failed, the run goes on without it: no route to host"
        for name in ("wandb", "trackio")
    ]
    assert points(fakes("wandb"), "loss") == []


@pytest.mark.usefixtures("fakes")
def test_a_tracker_that_does_not_start_is_one_line(tmp_path):
    (tmp_path / "packages" / "wandb.py").write_text("def init(**_): raise OSError('no key\\nmore')")
    with pytest.raises(InputError, match=r"--trackers wandb does not start: no key; put that") as e:
        tracking(tmp_path, "wandb")
    assert "\n" not in str(e.value)


@pytest.mark.usefixtures("fakes")
def test_other_processes_start_none(tmp_path):
    with tracking(tmp_path, "wandb", "trackio", is_main=False) as trackers:
        trackers.log({"loss": 1.0}, 1)
    assert not list((tmp_path / "packages").glob("*.jsonl"))


def test_a_package_that_is_missing_is_named_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr("eval.tracking.importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match="trackio is not installed: pip install trackio, or leave"):
        require_trackers(("trackio",))
