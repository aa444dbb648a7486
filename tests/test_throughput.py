"""The program that times the parts of a run, on a few small pictures."""

import json
import runpy
import signal
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from eval import throughput
from eval.plan import read_roofline
from eval.recipes import RECIPES
from eval.throughput import TITLES

PROGRAM = Path(throughput.__file__)
TINY = ["demo", "--encoder.backbone", "test_resnet", "--encoder.stem", "imagenet",
        "--encoder.dim", "16", "--moco.queue", "20", "--batch", "8", "--data.threads", "1",
        "--rounds", "2", "--seconds", "0.01"]  # fmt: skip


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """What the program sets in its process, which is this one."""
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)


def timed(monkeypatch, *words):
    """What ``python eval/throughput.py WORDS`` does, in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["throughput.py", *map(str, words)])
    try:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.parametrize("engine", ["kernels", "torchvision", "dali"])
def test_every_part_has_a_speed_and_one_of_them_limits(
    shard_set, tmp_path, monkeypatch, capsys, engine
):
    picture, figures = tmp_path / "roofline.png", tmp_path / "figures.json"
    flags = ["--data.shards", shard_set, "--output", picture, "--json", figures]
    assert timed(monkeypatch, *TINY, *flags, "--data.engine", engine) == 0
    found = json.loads(figures.read_text())
    speeds = found["images_per_second"]
    assert list(speeds) == list(TITLES)
    for speed in speeds.values():
        assert len(speed["rounds"]) == 2 and min(speed["rounds"]) > 0
        assert min(speed["rounds"]) <= speed["median"] <= max(speed["rounds"])
    parts = [speeds[name]["median"] for name in ("read", "decode", "views", "model")]
    assert speeds[found["judgement"]["limit"]]["median"] == min(parts)
    # Thirty epochs of five steps of eight.
    assert found["hours"] == pytest.approx(1200 / speeds["together"]["median"] / 3600)
    assert found["samples"] == 40 and found["setting"]["image_px"] == 32
    assert read_roofline(figures, RECIPES["demo"]) == speeds["together"]["median"]
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width > 400
    said = capsys.readouterr().out
    assert f"{found['judgement']['limit']} limits: " in said and "to change: " in said
    assert "1,200 images of a set of 40 take" in said


def test_loader_and_model_together_are_no_faster_than_the_slower_of_both(
    shard_set, tmp_path, monkeypatch
):
    figures = tmp_path / "figures.json"
    flags = ["--data.shards", shard_set, "--json", figures, "--seconds", "0.3"]
    assert timed(monkeypatch, *TINY, *flags) == 0
    speeds = json.loads(figures.read_text())["images_per_second"]
    fastest = {name: max(speed["rounds"]) for name, speed in speeds.items()}
    assert min(speeds["together"]["rounds"]) < 1.3 * min(fastest["loader"], fastest["model"])
    assert min(speeds["loader"]["rounds"]) < 1.3 * min(fastest["decode"], fastest["views"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nonsense"], "there is no recipe 'nonsense'"),
        (["demo"], "no pictures: give the folder"),
        (["demo", "--rounds", "0"], "--rounds 0: give a number of at least 1"),
        (["demo", "--seconds", "0"], "--seconds 0.0: give a number above 0"),
        (["demo", "--output", "run"], "--output run: give a file NAME.png"),
        (["demo", "--output", "absent/x.png"], "--output absent/x.png: its folder does not exist"),
        (["demo", "--json", "."], "--json .: give a file"),
        (["demo", "--secs", "1"], "Unrecognized options: --secs"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(flags, message, monkeypatch, capsys):
    assert timed(monkeypatch, *flags) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {message}") and len(said.err.splitlines()) == 1


def test_a_batch_that_batch_norm_cannot_share_out_is_named(shard_set, monkeypatch, capsys):
    flags = ["--data.shards", shard_set, "--batch", "6"]
    assert timed(monkeypatch, *TINY, *flags) == 2
    assert "batch" in capsys.readouterr().err
