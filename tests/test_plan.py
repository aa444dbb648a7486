"""The plan of a run: its figures, where its speed is from, and what it refuses."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from eval.plan import dictionary_bytes, make_plan, read_roofline
from eval.plan_config import PlanConfig
from eval.plan_report import as_size, settings_or_plan, show_plan, title_of
from eval.recipes import RECIPES
from eval.roofline import figure
from model.end_to_end import BatchKeys
from model.mechanism import make_dictionary
from model.moco import MoCoConfig
from model.step_memory import bytes_of
from pipeline.program import InputError

DEMO = RECIPES["demo"]
TINY = replace(
    DEMO, encoder=replace(DEMO.encoder, backbone="test_resnet", layers=None), precision="bf16"
)
PLAN = PlanConfig(pictures=4000, processes=2)


def with_shards(shards, **changes):
    return replace(TINY, data=replace(TINY.data, shards=str(shards)), **changes)


def test_length_and_storage_follow_from_the_set(shard_set):
    found = make_plan(with_shards(shard_set, batch=8, keep=2), PlanConfig(processes=2))
    assert vars(found.length) == {
        "pictures": 40,
        "batch": 8,
        "processes": 2,
        "micro_batches": 1,
        "steps_per_epoch": 5,
        "steps": 150,
        "epochs": 30,
    }
    assert found.storage.shards == sum(tar.stat().st_size for tar in shard_set.glob("*.tar"))
    assert found.storage.checkpoints == 3 * found.storage.checkpoint
    assert found.time is None


def test_a_set_that_is_not_packed_needs_its_number_only():
    found = make_plan(replace(TINY, steps=1000), PLAN)
    assert (found.length.pictures, found.length.steps_per_epoch) == (4000, 62)
    assert found.length.epochs == pytest.approx(1000 / 62)
    assert found.storage.shards is None


def test_each_process_has_its_share_of_the_batch_and_all_of_the_network():
    one, four = (make_plan(TINY, replace(PLAN, processes=n)).memory for n in (1, 4))
    assert (one.weights, one.optimiser, one.dictionary) == (
        four.weights,
        four.optimiser,
        four.dictionary,
    )
    assert one.views == 4 * four.views == 2 * 64 * 3 * 32 * 32 * 4
    assert (one.buckets, four.buckets) == (0, one.optimiser)
    assert one.step - one.optimiser > 2 * (four.step - four.optimiser)  # gradients stay
    assert one.total == sum(vars(one).values())


def test_micro_batches_are_named_and_take_less_memory_in_a_step():
    whole, parts = (make_plan(replace(TINY, micro_batch=size), PLAN) for size in (None, 16))
    assert parts.length.micro_batches == 2
    assert parts.memory.step < 0.9 * whole.memory.step  # most of it are gradients here
    assert "batch 64 on 2 x 32 in micro-batches of 16, precision" in title_of(parts)


@pytest.mark.parametrize("mechanism", ["queue", "memory-bank", "batch", "end-to-end"])
def test_the_dictionary_takes_what_a_real_one_takes(mechanism):
    config = MoCoConfig(mechanism=mechanism, queue=30, queue_dtype="bfloat16")
    real = make_dictionary(config, 16, 50, 0)
    assert dictionary_bytes(config, 16, 50)[0] == bytes_of(real.buffers())
    assert (bytes_of(real.buffers()) == 0) == isinstance(real, BatchKeys)


def test_hours_and_cost_follow_from_a_given_speed():
    config = replace(TINY, steps=9000)
    found = make_plan(config, replace(PLAN, images_per_s=40.0, price=2.5)).time
    assert found.hours == pytest.approx(9000 * 64 / (2 * 40) / 3600)
    assert found.gpu_hours == 2 * found.hours
    assert found.cost == pytest.approx(2.5 * found.gpu_hours)
    assert found.is_measured


def test_an_estimate_is_a_share_of_the_peak_and_says_so():
    plan = make_plan(TINY, replace(PLAN, gpu="H100", utilisation=0.1))
    expected = 0.1 * 989.5e12 / plan.flops.total
    assert plan.time.images_per_s == pytest.approx(expected)
    assert not plan.time.is_measured
    assert "estimate, nothing was measured: 10% of the 990 TFLOP/s of H100" in plan.time.source


def figures_of_roofline(path, speed=50.0, **changes):
    setting = {"image_px": 32, "precision": "bf16"}
    content = {"recipe": "demo", "setting": setting, **changes}
    path.write_text(json.dumps({"images_per_second": {"together": {"median": speed}}} | content))
    return path


def test_a_speed_that_was_measured_is_read_from_its_file(tmp_path):
    path = figures_of_roofline(tmp_path / "roofline.json")
    found = make_plan(TINY, replace(PLAN, roofline=path)).time
    assert (found.images_per_s, found.is_measured) == (50, True)
    assert found.source == f"measured, {path}"


WRONG = {
    "a roofline of another recipe": ({"recipe": "cifar10"}, "with cifar10 at 32 px.*this is demo"),
    "a roofline without a speed": ({"images_per_second": {}}, "not what eval/throughput.py"),
    "a roofline that stood still": ({"speed": 0.0}, "speed of 0.0: measure again"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_does_not_fit_is_refused(case, tmp_path):
    changes, message = WRONG[case]
    path = figures_of_roofline(tmp_path / "roofline.json", **changes)
    with pytest.raises(InputError, match=message):
        read_roofline(path, TINY)


REFUSED = {
    "an unknown GPU": (["--plan.gpu", "Abacus"], "Abacus: its peak .* give one of B200, "),
    "a GPU without bfloat16": (
        ["--plan.gpu", "V100", "--precision", "bf16"],
        "V100: its peak with --precision bf16 is not known",
    ),
    "a price alone": (["--plan.price", "2"], r"--plan.price 2.0 needs a speed"),
    "no processes": (["--plan.processes", "0"], "--plan.processes 0: give a number of at least 1"),
    "a share above 1": (["--plan.utilisation", "3"], "at most 1"),
    "two speeds": (["--plan.images-per-s", "1", "--plan.roofline", "x"], "both give the speed"),
    "pictures and shards": (["--data.shards", "x"], "both give the pictures"),
    "too many processes": (["--plan.processes", "3"], "3 processes cannot share"),
    "a file that is not there": (["--plan.roofline", "missing.json"], "missing.json"),
    "a backbone that timm has not": (["--encoder.backbone", "resnet5"], "timm has no backbone"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_settings_of_a_plan_are_refused(case):
    flags, message = REFUSED[case]
    with pytest.raises((ValueError, OSError), match=message):
        settings_or_plan(["demo", "--plan", "--plan.pictures", "4000", *flags], "")


def test_a_plan_needs_pictures_or_their_number():
    with pytest.raises(InputError, match=r"no pictures: give --data.shards, or --plan.pictures N"):
        make_plan(TINY, PlanConfig())


def test_settings_of_a_plan_start_no_run():
    with pytest.raises(InputError, match="without --plan"):
        settings_or_plan(["demo", "--plan.price", "2"], "")


def test_without_plan_the_settings_come_back():
    assert settings_or_plan(["demo", "--seed", "3"], "").seed == 3


def test_the_table_and_the_file_have_the_same_figures(tmp_path):
    text, path = io.StringIO(), tmp_path / "plan.json"
    settings = replace(PLAN, images_per_s=123.0, price=2.0, json=path)
    show_plan(TINY, settings, Console(file=text, width=120))
    figures = json.loads(path.read_text())
    for name, value in {
        "pictures": "4,000",
        "steps": f"{figures['length']['steps']:,}",
        "memory": as_size(figures["memory"]["total"]),
        "checkpoints": as_size(figures["storage"]["checkpoints"]),
        "cost": figure(figures["time"]["cost"]),
    }.items():
        (line,) = [line for line in text.getvalue().splitlines() if line.startswith(f"│ {name} ")]
        assert line.split("│")[2].strip() == value
    assert figures["flops"]["total"] == sum(
        figures["flops"][part] for part in ("forward", "backward", "loss")
    )


def test_figures_have_no_exponents():
    numbers = (0, 7.98e-06, 0.0117, 13.33, 416_666.7)
    assert [figure(n) for n in numbers] == ["0", "below 0.001", "0.0117", "13.3", "416,667"]


def test_a_plan_says_that_the_queue_is_long_for_the_pictures():
    text = io.StringIO()
    config = replace(TINY, moco=replace(TINY.moco, queue=1001))
    show_plan(config, PLAN, Console(file=text, width=120))
    assert "the queue of 1,001 keys is longer than a quarter of the 4,000" in text.getvalue()


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (27_966_656, "28 MB")]
)
def test_sizes_have_three_digits(size, text):
    assert as_size(size) == text
