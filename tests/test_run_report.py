"""What a run tells: lines, log, tracker, curve."""

import io
import json
import math

import pytest
from PIL import Image
from rich.console import Console

from eval.alarms import Alarms
from eval.run_report import RunReport, duration, sparkline, trim_log

VALUES = {
    "loss": 5.4321,
    "pretext_accuracy": 0.256,
    "images_per_second": 1234.5,
    "data_wait_share": 0.031,
    "images_seen": 12_345_678.0,
    "training_seconds": 3725.0,
    "learning_rate": 0.0123456,
}


@pytest.fixture
def make_report(tmp_path):
    """``make_report(**changes)`` gives a report, what it printed and what it tracked."""

    def make(*, is_terminal=False, **changes):
        printed, tracked = io.StringIO(), []
        settings = {
            "total_steps": 40,
            "first_step": 0,
            "track": lambda values, step: tracked.append((step, values)),
            "alarms": Alarms(math.log(512), 511, 4000, settled_step=30),
            "console": Console(file=printed, force_terminal=is_terminal, width=100),
        }
        run = changes.pop("run", tmp_path)
        return RunReport(run, "a title", **{**settings, **changes}), printed, tracked

    return make


HEALTH = {
    "positive_similarity": 0.72,
    "negative_similarity": 0.15,
    "effective_rank": 47.3,
    "highest_rank": 128,
    "uniformity": -2.53,
    "alignment": 0.56,
    "positive_counts": [0] * 36 + [2, 4, 8, 4],
    "negative_counts": [0] * 20 + [9, 9] + [0] * 18,
    "key_age_steps": 4.5,
    "oldest_key_steps": 8,
    "queue_filled_share": 1.0,
    "encoder_distance": 0.0123,
    "false_negative_share": 0.098,
}


def logged(run):
    return [json.loads(line) for line in (run / "run.jsonl").read_text().splitlines()]


def test_a_plain_line_says_everything_once(make_report):
    report, printed, _ = make_report()
    with report:
        report.steps(10, VALUES)
    (line,) = printed.getvalue().splitlines()
    assert line.startswith("step 10/40  ")
    for part in (
        f"loss 5.432 (chance {math.log(512):.2f})",
        "pretext accuracy 25.6%",
        "speed 1,234 images/s",
        "waiting for data 3.1%",
        "learning rate 0.01235",
        "kNN top-1 not asked for",
        "time left 0 s",
    ):
        assert line.count(part) == 1, part


def test_a_live_display_is_there_and_moves_before_the_first_report(make_report):
    report, printed, _ = make_report(is_terminal=True)
    with report:
        report.advance(3)
    assert "for the first report" in printed.getvalue()
    assert "3/40" in printed.getvalue()


def test_arithmetic_and_gpu_memory_are_shown_where_they_are_known(make_report):
    report, printed, _ = make_report()
    gpu = {"flops_per_second": 1.5e12, "gpu_memory_gib": 3.0, "gpu_memory_peak_gib": 9.0}
    with report:
        report.steps(10, VALUES)
        report.steps(20, VALUES | gpu)
    first, second = (line for line in printed.getvalue().splitlines() if line.startswith("step"))
    assert "arithmetic" not in first and "GPU" not in first
    assert "arithmetic 1.5 TFLOP/s  GPU memory 3.0 GiB, at most 9.0  learning rate" in second


def test_a_knn_score_has_a_line_of_its_own_and_stays_in_the_others(make_report):
    report, printed, _ = make_report()
    with report:
        report.knn(10, 0.125)
        report.steps(20, VALUES)
    first, second = printed.getvalue().splitlines()
    assert first == "step 10: kNN top-1 12.50%"
    assert "kNN top-1 12.50%" in second


def test_a_look_at_the_dictionary_has_a_line_of_its_own(make_report, tmp_path):
    report, printed, tracked = make_report()
    with report:
        report.steps(10, VALUES)
        report.health(10, HEALTH)
    line = printed.getvalue().splitlines()[1]
    assert line == (
        "step 10: keys span 47.3 of 128 dimensions  uniformity -2.53  "
        "own key 0.72 -1│                  ▄█│1  other keys 0.15 -1│          █         │1  "
        "age of keys 4.5 steps (oldest 8)  encoders apart 1.23%  false negatives 9.8%"
    )
    found = {**HEALTH, "chance_loss": math.log(512)}
    assert logged(tmp_path)[1] == {"step": 10, **found}
    assert tracked[1] == (10, found)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_an_alarm_is_said_once_logged_and_stays_in_the_panel(make_report, tmp_path, is_terminal):
    report, printed, tracked = make_report(is_terminal=is_terminal)
    with report:
        for step in (10, 20, 30, 31, 32, 33):
            report.steps(step, VALUES)
            report.health(step, {**HEALTH, "effective_rank": 1.0})
    alarms = [line for line in logged(tmp_path) if "alarm" in line]
    assert [(line["step"], line["alarm"]) for line in alarms] == [(32, "collapse")]
    assert [value["alarm"] for _, value in tracked if "alarm" in value] == ["collapse"]
    said = printed.getvalue().count("collapse: the embeddings")
    assert said == 1 if not is_terminal else said >= 2


def test_a_queue_longer_than_the_data_is_said_at_the_start(make_report):
    report, printed, _ = make_report(alarms=Alarms(6.2, 511, samples=511, settled_step=0))
    with report:
        pass
    assert "step 0: alarm: the queue of 511 keys is longer than the data" in printed.getvalue()


def test_a_terminal_gets_one_panel_instead_of_lines(make_report):
    report, printed, _ = make_report(is_terminal=True)
    with report:
        for step in (10, 20):
            report.steps(step, VALUES)
    shown = printed.getvalue()
    assert "a title" in shown
    assert "recent loss" in shown
    assert "step 10/40  " not in shown


def test_every_report_is_logged_and_tracked(make_report, tmp_path):
    report, _, tracked = make_report()
    with report:
        report.steps(10, VALUES)
        report.knn(10, 0.5)
    assert logged(tmp_path) == [{"step": 10, **VALUES}, {"step": 10, "knn_top1": 0.5}]
    assert tracked == [(10, VALUES), (10, {"knn_top1": 0.5})]


def test_another_rank_prints_logs_and_tracks_nothing(make_report, tmp_path):
    report, printed, tracked = make_report(run=None)
    with report:
        report.steps(10, VALUES)
        report.finish()
    assert (printed.getvalue(), tracked, list(tmp_path.iterdir())) == ("", [], [])


def colours_of(path):
    picture = Image.open(path).convert("RGB")
    return {colour for _, colour in picture.getcolors(picture.width * picture.height)}


@pytest.mark.parametrize("has_alarm", [False, True])
def test_the_curve_shows_the_dictionary_and_alarms(make_report, tmp_path, has_alarm):
    report, _, _ = make_report()
    with report:
        for step in (30, 40, 50):
            report.steps(step, VALUES)
            report.health(step, {**HEALTH, "effective_rank": 1.0 if has_alarm else 60.0})
        report.finish()
    colours = colours_of(tmp_path / "curve.png")
    green, red = (44, 160, 44), (214, 39, 40)  # the rank; alarms
    assert green in colours
    assert (red in colours) == has_alarm


@pytest.mark.parametrize("has_knn", [False, True])
def test_the_curve_is_a_picture_of_the_whole_run(make_report, tmp_path, has_knn):
    report, _, _ = make_report()
    with report:
        for step in (10, 20, 30):
            report.steps(step, {**VALUES, "loss": step})
        if has_knn:
            report.knn(30, 0.5)
        report.finish()
    colours = colours_of(tmp_path / "curve.png")
    blue, orange = (31, 119, 180), (255, 127, 14)  # the loss; kNN, the second line below
    assert blue in colours
    assert (orange in colours) == has_knn


def test_a_run_that_logged_nothing_has_no_curve(make_report, tmp_path):
    report, _, _ = make_report()
    report.finish()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "bars"),
    [
        ([0.0, 7.0], "▁█"),
        ([float(value) for value in range(8)], "▁▂▃▄▅▆▇█"),
        ([3.0, 3.0, 3.0], "▁▁▁"),
        ([5.0], "▁"),
        ([8.0, 1.0, 4.5], "█▁▅"),
    ],
)
def test_a_sparkline_reaches_from_the_lowest_to_the_highest_value(values, bars):
    assert sparkline(values) == bars


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (184, "3 min 04 s"),
     (3599.6, "1 h 00 min"), (3720, "1 h 02 min"), (360_000, "100 h 00 min")],
)  # fmt: skip
def test_a_duration_is_read_at_a_glance(seconds, text):
    assert duration(seconds) == text


def test_a_resumed_run_drops_later_and_half_written_lines(tmp_path):
    steps = [10, 20, 30, 40]
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in steps]
    (tmp_path / "run.jsonl").write_text("\n".join([*lines, '{"step": 50, "lo']))
    trim_log(tmp_path / "run.jsonl", 20)
    assert [line["step"] for line in logged(tmp_path)] == [10, 20]
    assert [path.name for path in tmp_path.iterdir()] == ["run.jsonl"]


@pytest.mark.parametrize("garbage", ["", "{", "7", "[]", '{"loss": 1}', '{"step": null}'])
def test_a_line_that_is_no_report_is_dropped(tmp_path, garbage):
    path = tmp_path / "run.jsonl"
    path.write_text(f'{{"step": 1}}\n{garbage}\n{{"step": 2}}\n')
    trim_log(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_run_without_a_log_has_nothing_to_trim(tmp_path):
    trim_log(tmp_path / "run.jsonl", 3)
    assert not list(tmp_path.iterdir())


def test_the_time_left_is_that_of_the_steps_of_this_part_of_the_run(make_report, monkeypatch):
    now = iter([1000.0, 1020.0])
    monkeypatch.setattr("eval.run_report.time.monotonic", lambda: next(now))
    report, _, _ = make_report(total_steps=100, first_step=50)
    assert report._time_left(60) == "1 min 20 s"  # 10 steps in 20 s, 40 to go
