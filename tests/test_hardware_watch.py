"""Utilisation and memory: the arithmetic, with GPUs that are names only."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from eval.hardware_watch import (
    HardwareWatch,
    cuda_memory,
    describe_hardware,
    watch_hardware,
    with_prefix,
)
from eval.recipes import RECIPES

GIB = 1 << 30
H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("precision", "world", "expected"),
    [
        ("bf16", 1, 4000 * 32.5e9 / 989.5e12),
        ("fp16", 8, 4000 * 32.5e9 / (8 * 989.5e12)),
        ("no", 1, 4000 * 32.5e9 / 494.5e12),
    ],
)
def test_utilisation_is_the_arithmetic_over_the_peak_of_all_gpus(precision, world, expected):
    watch = HardwareWatch(int(32.5e9), H100, precision, world, lambda: (3 * GIB, 40 * GIB))
    assert watch.values(4000.0) == pytest.approx(
        {
            "flops_per_second": 130e12,
            "model_flop_utilisation": expected,
            "gpu_memory_gib": 3,
            "gpu_memory_peak_gib": 40,
        }
    )


def test_an_unknown_gpu_and_a_cpu_have_no_utilisation():
    unknown = HardwareWatch(1000, "Some GPU 9000", "bf16", 1, lambda: (0, GIB)).values(5.0)
    assert unknown == {"flops_per_second": 5000, "gpu_memory_gib": 0, "gpu_memory_peak_gib": 1}
    assert HardwareWatch(1000, None, "no", 2, None).values(5.0) == {"flops_per_second": 5000}


def test_people_see_prefixes_and_only_what_is_known():
    values = {"flops_per_second": 130.26e12, "model_flop_utilisation": 0.1317}
    memory = {"gpu_memory_gib": 3.04, "gpu_memory_peak_gib": 39.96}
    assert describe_hardware(values | memory) == [
        ("arithmetic", "130 TFLOP/s, 13.2% of the peak"),
        ("GPU memory", "3.0 GiB, at most 40.0"),
    ]
    assert describe_hardware({"flops_per_second": 4.56e9}) == [("arithmetic", "4.56 GFLOP/s")]
    assert describe_hardware({}) == []
    assert (with_prefix(2.5e15), with_prefix(9.9e6), with_prefix(12.0)) == ("2.5 P", "9.9 M", "12 ")


def test_a_run_counts_its_own_network_and_asks_its_own_gpu(monkeypatch):
    config = dataclasses.replace(RECIPES["demo"], precision="bf16")
    run = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    cpu = watch_hardware(config, run).values(10.0)
    assert set(cpu) == {"flops_per_second"} and cpu["flops_per_second"] > 1e6
    device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", {device: H100}.__getitem__)
    monkeypatch.setattr(torch.cuda, "memory_allocated", {device: 2 * GIB}.__getitem__)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", {device: 5 * GIB}.__getitem__)
    resets = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    gpu = watch_hardware(config, SimpleNamespace(device=device, num_processes=2)).values(10.0)
    assert gpu["flops_per_second"] == cpu["flops_per_second"]
    assert gpu["model_flop_utilisation"] == gpu["flops_per_second"] / (2 * 989.5e12)
    assert (gpu["gpu_memory_gib"], gpu["gpu_memory_peak_gib"], resets) == (2, 5, [device])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_peak_of_memory_is_that_since_the_reading_before():
    device = torch.device("cuda", 0)
    cuda_memory(device)
    block = torch.empty(64 << 20, dtype=torch.uint8, device=device)
    del block
    now, most = cuda_memory(device)
    assert most >= now + (64 << 20)
    assert cuda_memory(device)[1] < most
