"""What turns encoded pictures and view parameters into tensors, and which of them a run gets.

Letters in names: N pictures, H W pixels.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data_config import DataConfig, cpu_threads
from pipeline.program import InputError
from pipeline.torch_views import TorchEngine
from pipeline.view_recipe import PAIRS, ViewRequest

try:
    from pipeline.dali_views import DaliEngine
except ImportError:  # DALI has wheels for Linux only
    DaliEngine = None  # type: ignore[assignment,misc]

Bytes = NDArray[np.uint8]


class Engine(Protocol):
    """What makes views of requests: ``dali_views.DaliEngine`` or ``torch_views.TorchEngine``."""

    def take(self) -> tuple[Tensor, ...]: ...  # noqa: D102
    def make(self, request: ViewRequest) -> tuple[Tensor, ...]: ...  # noqa: D102
    def undecodable(self, pictures: list[Bytes]) -> dict[int, str]: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


def make_engine(
    config: DataConfig,
    next_request: Callable[[], ViewRequest],
    batch: int,
    device: torch.device,
    *,
    half: bool,
) -> Engine:
    """DALI where it is installed, else (or on request) Pillow and torchvision.

    Raises:
        InputError: if DALI is asked for and not installed.
    """
    normalisation = (config.mean, config.std)
    threads = cpu_threads(config)
    if config.engine == "torchvision" or (config.engine == "auto" and DaliEngine is None):
        return TorchEngine(
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
            "nvidia-dali-cuda120), or use --data.engine torchvision"
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
