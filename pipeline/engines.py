"""What turns encoded pictures and view parameters into tensors, and which of them a run gets.

Letters in names: N pictures, H W pixels.
"""

from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data_config import DataConfig, cpu_threads
from pipeline.kernel_views import KernelEngine
from pipeline.program import InputError
from pipeline.torch_views import TorchEngine
from pipeline.view_recipe import PAIRS, ViewRequest

try:
    from pipeline.dali_views import DaliEngine
except ImportError:  # DALI has wheels for Linux only
    DaliEngine = None  # type: ignore[assignment,misc]

Bytes = NDArray[np.uint8]


class Engine(Protocol):
    """What makes views of requests: ``DaliEngine``, ``KernelEngine`` or ``TorchEngine``."""

    def take(self) -> tuple[Tensor, ...]: ...  # noqa: D102
    def make(self, request: ViewRequest) -> tuple[Tensor, ...]: ...  # noqa: D102
    def undecodable(self, pictures: list[Bytes]) -> dict[int, str]: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


def engine_for(device: torch.device) -> Literal["dali", "kernels"]:
    """What makes views for this device unless the user says."""
    return "dali" if device.type == "cuda" and DaliEngine is not None else "kernels"


def make_engine(
    config: DataConfig,
    next_request: Callable[[], ViewRequest],
    batch: int,
    device: torch.device,
    *,
    half: bool,
) -> Engine:
    """On a GPU DALI where it is installed, else the compiled kernels; or what is asked for.

    Raises:
        InputError: if DALI is asked for and not installed.
    """
    name = engine_for(device) if config.engine == "auto" else config.engine
    normalisation = (config.mean, config.std)
    threads = cpu_threads(config)
    if name != "dali":
        on_cpu = KernelEngine if name == "kernels" else TorchEngine
        return on_cpu(
            next_request,
            image_px=config.image_px,
            normalisation=normalisation,
            device=device,
            half=half,
            threads=threads,
        )
    if DaliEngine is None:
        raise InputError(
            "--data.engine dali: DALI is not installed here; install nvidia-dali-cuda130 (or "
            "nvidia-dali-cuda120), or use --data.engine kernels"
        )
    return DaliEngine(
        next_request,
        PAIRS[config.views],
        batch=batch,
        image_px=config.image_px,
        normalisation=normalisation,
        device=device,
        half=half,
        threads=threads,
    )
