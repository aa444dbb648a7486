"""The page about a run: all of it in one file, nothing loaded, what is hostile escaped."""

import dataclasses
import json
import re
import shutil
import subprocess

import pytest
import torch

from eval.recipes import RECIPES
from eval.report import ReportConfig, write_report
from eval.report_page import Page, curve_of, shown
from model.checkpoint import save_checkpoint
from model.encoder import EncoderConfig
from model.key_queue import KeyQueue
from model.moco import MoCo, MoCoConfig
from model.run_state import RunState
from pipeline.program import InputError
from pipeline.settings import to_plain
from pipeline.shard_store import ShardStore

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def run(tmp_path_factory, shard_set):
    """A run's folder as train.py leaves it, after 6 steps."""
    folder = tmp_path_factory.mktemp("run")
    demo = RECIPES["demo"]
    config = dataclasses.replace(
        demo,
        encoder=EncoderConfig(backbone="test_resnet", dim=8),
        moco=dataclasses.replace(demo.moco, queue=20),
        data=dataclasses.replace(demo.data, shards=str(shard_set)),
    )
    moco = MoCo(config.encoder, MoCoConfig(batch_norm_groups=4), global_batch=16, seed=0)
    state = RunState(moco, KeyQueue(20, 8, 0), torch.optim.SGD(moco.parameters(), lr=0.1), None)
    identity = ShardStore(shard_set).manifest.sha256
    taken = state.snapshot(6, {"config": to_plain(config), "data": {"manifest_sha256": identity}})
    save_checkpoint(folder, taken.step, taken.tensors, taken.state)
    lines = [
        {"step": step, "loss": 3.0 - 0.1 * step, "pretext_accuracy": 0.1 * step, "key_norm": 1.0}
        for step in range(1, 7)
    ]
    lines[-1] |= {"images_seen": 96.0, "training_seconds": 3725.0, "data_wait_share_so_far": 0.25}
    lines[-1] |= {"flops_per_second": 1.5e12, "effective_rank": 5.5, "chance_loss": 3.125}
    lines += [{"step": 3, "alarm": "collapse", "alarm_text": f"collapse: {HOSTILE}"}]
    # A score comes when it is ready, after lines of later steps.
    lines += [{"step": 5, "knn_error": "no memory"}, {"step": 4, "knn_top1": 0.625}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "run.jsonl").write_text(text + '{"step": 7, "lo')  # as a kill leaves it
    bad = {"step": 2, "shard": "shard-000000.tar", "index": 3, "key": HOSTILE, "reason": "broken"}
    (folder / "quarantine-0.jsonl").write_text(json.dumps(bad) + "\n")
    (folder / "skipped-0.jsonl").write_text('{"step": 4, "samples": [1]}\n')
    (folder / "environment.json").write_text(json.dumps({"packages": {"torch": "9.8.7"}}))
    return folder


@pytest.fixture(scope="module")
def page(run):
    return write_report(ReportConfig(run=run, pictures=3, neighbours=4)).read_text()


def test_the_page_has_every_part(page):
    assert re.findall("<h2>(.*?)</h2>", page) == [
        *("Curves", "Health of the dictionary", "What else was logged", "kNN history", "Views"),
        *("Nearest neighbours", "Settings", "Environment", "Left out"),
    ]
    assert "loss (nats): 2.4" in page and "key norm: 1" in page
    assert '<td>4</td><td>62.50%</td></tr><tr class=""><td>5</td><td>none: no memory<' in page
    assert page.count("data:image/jpeg;base64,") == 3 * 5 + 3 * (1 + 4)
    assert "<td>packages.torch</td><td>9.8.7</td>" in page
    assert "1 bad samples, 1 steps" in page and "<td>broken</td><td>1</td>" in page


def test_an_alarm_stands_at_the_top_and_chance_in_the_curve_of_the_loss(page):
    before_curves = page.split("<h2>")[0]
    assert "Alarm at step 3: collapse: &lt;script&gt;" in before_curves
    assert "the loss of guessing, log(K + 1) = 3.125" in page
    curves = re.findall("<svg.*?</svg>", page)
    assert ["stroke-dasharray" in curve for curve in curves] == ["loss (nats)" in c for c in curves]
    assert "pretext accuracy: 60.00%" in page


def test_a_dashed_line_is_within_the_range_of_its_curve():
    curve = curve_of("loss", [(1, 2.0), (2, 1.0)], mark=5.0)
    heights = [float(y) for y in re.findall(r'y1="([\d.]+)"', curve)]
    assert heights == [26.0]
    assert ">5</text>" in curve


def test_the_top_of_the_page_has_totals_and_the_last_step(page):
    facts = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert facts["step"] == "6"
    assert (facts["images seen"], facts["time of training"]) == ("96", "1 h 02 min")
    assert (facts["waiting for data"], facts["arithmetic"]) == ("25.0%", "1.5 TFLOP/s")
    assert (facts["trackers"], facts["kNN top-1"]) == ("tensorboard", "62.50%")
    assert "images seen: 96" not in page  # no curve


def test_the_settings_that_differ_from_the_recipe_stand_out(page):
    assert '<tr class="marked"><td>moco.queue</td><td>20</td><td>512</td></tr>' in page
    assert '<tr class=""><td>batch</td><td>64</td><td>64</td></tr>' in page


def test_the_page_loads_nothing_and_runs_nothing(page):
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "<script" not in page and "url(" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_a_picture_is_not_its_own_neighbour(page):
    captions = [float(value) for value in re.findall(r"</?img[^>]*>([\d.]+)</td>", page)]
    assert len(captions) == 3 * 4
    rows = [captions[start : start + 4] for start in range(0, 12, 4)]
    assert all(row == sorted(row, reverse=True) for row in rows)


def test_a_folder_without_a_run_is_a_wrong_input(tmp_path):
    with pytest.raises(InputError, match=r"no run\.jsonl"):
        write_report(ReportConfig(run=tmp_path))


def test_pictures_of_another_set_are_no_page_of_this_run(run, tmp_path, pack_set, clean_pictures):
    other = str(pack_set(tmp_path / "other", clean_pictures[::-1], (40,)))
    output = tmp_path / "page.html"
    with pytest.raises(InputError, match="was trained on data set"):
        write_report(ReportConfig(run=run, shards=other, output=output))
    assert not output.exists()


def test_damaged_logs_and_an_environment_that_is_none_leave_the_rest_of_the_page(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    log = folder / "run.jsonl"
    log.write_bytes(b'\xff\n[]\n{"loss": 1}\n' + log.read_bytes())
    (folder / "environment.json").write_text("{")
    (folder / "quarantine-0.jsonl").write_text('{"step": 2}\n')
    page = write_report(ReportConfig(run=folder, pictures=1, neighbours=1)).read_text()
    assert "environment.json is damaged" in page and "loss (nats): 2.4" in page
    assert "1 bad samples" in page


def test_a_curve_of_one_point_or_of_none_that_is_finite_is_drawn_or_left_out():
    assert "<polyline" in curve_of("loss", [(1, 2.0)])
    assert curve_of("loss", [(1, float("nan"))]) == ""
    points = curve_of("loss", [(n, float(n)) for n in range(100_000)])
    assert len(points) < 20_000


def test_text_in_a_page_is_escaped_everywhere():
    page = Page(HOSTILE)
    page.heading(HOSTILE, HOSTILE)
    page.note(HOSTILE)
    page.facts({HOSTILE: HOSTILE})
    page.table((HOSTILE,), [(HOSTILE,)])
    page.figures([curve_of(HOSTILE, [(1, 1.0)])])
    assert "<script" not in page.html()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123456, "0.1235"), (12345.6, "12,346"), (None, "-"), ([1, 2.5], "1, 2.5"), (True, "True")],
)
def test_values_are_shown_as_people_read_them(value, text):
    assert shown(value) == text


def test_a_real_browser_shows_the_page(run, page, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium: install it to see the page rendered")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile")
    picture = tmp_path / "page.png"
    words = [browser, *flags, "--window-size=1400,2600", f"--screenshot={picture}"]
    done = subprocess.run(
        [*words, (run / "report.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0 and picture.stat().st_size > 50_000, done.stderr
    assert page
