"""Names as drivers give them, and the peak that belongs to them."""

import pytest

from eval.gpu_peaks import PEAKS, peak_of


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12, 494.5e12),
        ("NVIDIA H100 PCIe", 756.5e12, 378e12),
        ("NVIDIA H200", 989.5e12, 494.5e12),
        ("NVIDIA A100-SXM4-40GB", 312e12, 156e12),
        ("NVIDIA L4", 121e12, 60e12),
        ("NVIDIA L40S", 362e12, 183e12),
        ("Tesla V100-SXM2-32GB", 125e12, 15.7e12),
        ("Tesla V100-PCIE-16GB", 112e12, 14e12),
        ("h100", 989.5e12, 494.5e12),
    ],
)
def test_a_name_finds_the_dense_peak_of_its_form(name, half, single):
    assert peak_of(name, "fp16") == half
    assert peak_of(name, "bf16") == (None if "Tesla V" in name else half)
    assert peak_of(name, "no") == single


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 3090", "NVIDIA L400", "", "A10"])
def test_a_gpu_that_is_not_listed_has_no_peak(name):
    assert peak_of(name, "bf16") is None


def test_every_name_in_the_table_finds_its_own_line():
    assert {name: peak_of(name, "fp16") for name in PEAKS} == {n: p.half for n, p in PEAKS.items()}


@pytest.mark.parametrize(
    ("name", "units", "operations", "single", "clock_hz"),
    [
        ("A100", 108, 2048, 1024, 1.41e9),
        ("H100", 132, 4096, 2048, 1.83e9),
        ("A40", 84, 1024, 512, 1.74e9),
        ("L4", 58, 1024, 512, 2.04e9),
        ("L40S", 142, 1024, 512, 2.52e9),
        ("T4", 40, 1024, 128, 1.59e9),
        ("V100", 80, 1024, 128, 1.53e9),
    ],
)
def test_a_peak_is_units_times_operations_times_clock(name, units, operations, single, clock_hz):
    peak = PEAKS[name]
    assert peak.half == pytest.approx(units * operations * clock_hz, rel=0.015)
    assert peak.single == pytest.approx(units * single * clock_hz, rel=0.015)
