"""What the plan of a run is told beside the run's own settings."""

import math
from dataclasses import dataclass
from pathlib import Path

from pipeline.command_line import require_at_least_1
from pipeline.program import InputError


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Of --plan: how many processes, how fast, at what price."""

    processes: int | None = None
    """Processes, one for each GPU. None: those that this was launched with."""
    pictures: int | None = None
    """Pictures of a set that is not packed yet, instead of --data.shards."""
    images_per_s: float | None = None
    """Speed of one process, measured elsewhere."""
    roofline: Path | None = None
    """Speed of one process: the file that eval/throughput.py --json wrote where it will run."""
    gpu: str | None = None
    """Estimate the speed from the peak of this GPU (H100, A100, ...); None: of the one here."""
    utilisation: float = 0.15
    """Share of the peak that the estimate takes; training a ResNet-50 in half precision reaches 0.2
    on an A100 (timm issue 1491), and less on faster GPUs."""
    price: float | None = None
    """Of one GPU for an hour, in any currency."""
    json: Path | None = None
    """File for the figures."""

    def __post_init__(self) -> None:
        for name in ("processes", "pictures"):
            if getattr(self, name) is not None:
                require_at_least_1(self, name, prefix="plan.")
        for name in ("images_per_s", "utilisation", "price"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                flag = "--plan." + name.replace("_", "-")
                raise InputError(f"{flag} {value}: give a number above 0")
        if self.utilisation > 1:
            raise InputError(f"--plan.utilisation {self.utilisation}: give a share, at most 1")
        if self.images_per_s is not None and self.roofline is not None:
            raise InputError(
                "--plan.images-per-s and --plan.roofline both give the speed: leave one of them out"
            )
