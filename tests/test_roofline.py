"""Which part limits, on made-up speeds."""

from dataclasses import replace

import pytest
from PIL import Image

from eval.roofline import Setting, Speed, advise, draw, figure, hours, judge, unsteady

CPU = Setting(
    device="cpu",
    cores=4,
    threads=4,
    precision="no",
    image_px=224,
    shorter_px=375.0,
    is_remote=False,
)
GPU = replace(CPU, device="cuda", cores=8, threads=8, shorter_px=256.0)


def speeds_of(read=30_000.0, decode=400.0, views=800.0, model=100.0):
    return {"read": read, "decode": decode, "views": views, "model": model}


@pytest.mark.parametrize(
    ("speeds", "limit", "factor"),
    [
        ({"model": 100.0}, "model", 4.0),
        ({"model": 1000.0}, "decode", 2.0),
        ({"model": 1000.0, "views": 50.0}, "views", 8.0),
        ({"read": 10.0}, "read", 10.0),
    ],
)
def test_the_slowest_part_limits_by_its_distance_from_the_next(speeds, limit, factor):
    found = judge(speeds_of(**speeds), CPU)
    assert (found.limit, found.factor) == (limit, factor)


def test_shares_are_those_of_the_time_that_an_image_costs():
    found = judge(speeds_of(read=1000.0, decode=500.0, views=500.0, model=200.0), CPU)
    assert found.share == pytest.approx({"read": 0.1, "decode": 0.2, "views": 0.2, "model": 0.5})


def test_on_a_cpu_times_add_up_and_one_thread_reads():
    found = judge(speeds_of(read=1000.0, decode=500.0, views=500.0, model=200.0), CPU)
    assert found.possible == pytest.approx(1 / (0.001 / 4 + 0.002 + 0.002 + 0.005))
    assert found.without_limit == pytest.approx(1 / (0.001 / 4 + 0.002 + 0.002))


def test_on_a_gpu_the_slowest_of_host_and_gpu_decides():
    found = judge(speeds_of(read=1000.0, decode=300.0, views=4000.0, model=1000.0), GPU)
    assert found.possible == pytest.approx(300.0) and found.limit == "decode"
    assert found.without_limit == pytest.approx(1 / (1 / 4000 + 1 / 1000))
    found = judge(speeds_of(read=9000.0, decode=3000.0, views=4000.0, model=1000.0), GPU)
    assert found.possible == pytest.approx(1 / (1 / 4000 + 1 / 1000))
    assert found.without_limit == pytest.approx(3000.0)


def advice(speeds, of, together=None):
    found = judge(speeds_of(**speeds), of)
    return advise(found, together or found.possible, of)


def test_decoding_is_helped_by_threads_and_by_smaller_pictures():
    few = advice({"decode": 10.0}, replace(CPU, threads=2))
    assert few[0].startswith("--data.threads 4: 2 of")
    assert "--resize 256" in few[1] and "375 px" in few[1] and "about 47%" in few[1]
    (small,) = advice({"decode": 10.0}, replace(CPU, shorter_px=256.0))
    assert small.startswith("more cores")


def test_each_part_has_advice_of_its_own():
    assert "--data.cache-gib" in advice({"read": 1.0}, replace(CPU, is_remote=True))[0]
    assert "faster disk" in advice({"read": 1.0}, CPU)[0]
    assert "--data.image-px" in advice({"views": 1.0}, CPU)[0]
    assert advice({"views": 1.0}, replace(CPU, threads=1))[0].startswith("--data.threads 4")
    assert [line[:16] for line in advice({}, GPU)] == ["--precision bf16", "more or faster G"]
    assert len(advice({}, replace(GPU, precision="bf16"))) == 1


def test_parts_that_hinder_each_other_are_said():
    possible = judge(speeds_of(), CPU).possible
    assert len(advice({}, CPU, 0.81 * possible)) == 1
    assert "reach 50% of what" in advice({}, CPU, 0.5 * possible)[-1]


def test_hours_are_images_over_speed():
    assert hours(360_000, 100.0) == 1.0


def test_the_middle_and_the_range_of_the_rounds():
    speed = Speed((3.0, 1.0, 2.5))
    assert (speed.low, speed.median, speed.high) == (1.0, 2.5, 3.0)


def test_the_picture_has_bars_in_the_colour_of_the_limit(tmp_path):
    bars = {name: Speed((10.0, 11.0, 12.0)) for name in ("read", "decode", "views", "model", "all")}
    with (tmp_path / "bars.png").open("wb") as file:
        draw(bars, "views", "a title", file)
    image = Image.open(tmp_path / "bars.png").convert("RGB")
    colours = {colour: count for count, colour in image.getcolors(1 << 20)}
    red, blue = colours[(214, 39, 40)], colours[(31, 119, 180)]
    assert 2.5 < blue / red < 3.5 and colours[(128, 128, 128)] > red / 2


def test_speeds_have_three_digits_and_no_exponents():
    speeds = (0.01234, 1.234, 99.96, 1234.5, 62_380.0)
    assert [figure(speed) for speed in speeds] == ["0.0123", "1.23", "100", "1,234", "62,380"]


def test_rounds_that_differ_more_than_twofold_are_named():
    speeds = {"read": Speed((1.0, 2.0)), "model": Speed((1.0, 2.1, 1.5))}
    assert unsteady(speeds) == ["model"]
