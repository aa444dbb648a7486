"""How well a run uses its hardware: arithmetic against the GPU's peak, and GPU memory.

Model FLOP utilisation is that of PaLM (https://arxiv.org/abs/2204.02311, appendix B): the
operations that the model needs, whatever is computed beside or twice, over what the hardware could
do in that time.
"""

import functools
from collections.abc import Callable

import torch
from accelerate import Accelerator

from eval.gpu_peaks import peak_of
from eval.run_config import TrainConfig
from model.step_flops import flops_of_step

GIB = 1 << 30
PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))

count_flops = functools.cache(flops_of_step)


class HardwareWatch:
    """Figures of the hardware, from the speed of a run.

    Args:
        flops_per_image: floating-point operations of a step for each picture.
        gpu: name of the GPU; None on a CPU.
        precision: of train.py: no, bf16 or fp16.
        world: number of processes, each with such a GPU.
        memory: bytes of this process's GPU that are allocated, and that were at most since it was
            asked before; None on a CPU.
    """

    def __init__(
        self,
        flops_per_image: int,
        gpu: str | None,
        precision: str,
        world: int,
        memory: Callable[[], tuple[int, int]] | None,
    ) -> None:
        self._flops_per_image = flops_per_image
        peak = peak_of(gpu, precision) if gpu else None
        self._peak = peak * world if peak else None
        self._memory = memory

    def values(self, images_per_second: float) -> dict[str, float]:
        """By the names that logs use; utilisation where the GPU is a known one.

        Args:
            images_per_second: of all processes together.
        """
        flops = images_per_second * self._flops_per_image
        values = {"flops_per_second": flops}
        if self._peak:
            values["model_flop_utilisation"] = flops / self._peak
        if self._memory:
            allocated, most = self._memory()
            values |= {"gpu_memory_gib": allocated / GIB, "gpu_memory_peak_gib": most / GIB}
        return values


def watch_hardware(config: TrainConfig, accelerator: Accelerator) -> HardwareWatch:
    """The watch of a run on its device."""
    images = (config.data.image_px, config.batch)
    flops = count_flops(config.encoder, config.moco, *images).total
    device, world = accelerator.device, accelerator.num_processes
    is_gpu = device.type == "cuda"
    gpu = torch.cuda.get_device_name(device) if is_gpu else None
    memory = functools.partial(cuda_memory, device) if is_gpu else None
    return HardwareWatch(flops, gpu, config.precision, world, memory)


def cuda_memory(device: torch.device) -> tuple[int, int]:
    """Bytes that PyTorch has allocated, and the most since the call before; without DALI's."""
    found = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return found


def describe_hardware(values: dict[str, float]) -> list[tuple[str, str]]:
    """The figures for people: names and values; nothing where there are none."""
    rows = []
    if "flops_per_second" in values:
        text = f"{with_prefix(values['flops_per_second'])}FLOP/s"
        if "model_flop_utilisation" in values:
            text += f", {values['model_flop_utilisation']:.1%} of the peak"
        rows.append(("arithmetic", text))
    if "gpu_memory_gib" in values:
        text = f"{values['gpu_memory_gib']:.1f} GiB, at most {values['gpu_memory_peak_gib']:.1f}"
        rows.append(("GPU memory", text))
    return rows


def with_prefix(number: float) -> str:
    """12.3 G, 456 M: a number in thousands of thousands, three digits."""
    for size, prefix in PREFIXES:
        if number >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.3g} "
