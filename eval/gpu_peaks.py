"""Peak arithmetic of GPUs: what hours are estimated from before there is a measurement.

From the vendor's datasheets: dense (half of what "with sparsity" says), at the boost clock, matrix
units with float32 sums. A form factor that a name does not tell is taken as SXM.
Those of A40, L4, T4 and the NVL cards were compared in 2026-11 with tables that cite the datasheets
(with sparsity 242 and 120 TFLOP/s for an L4, 1,671 and 835 for both NVL cards), not with these
themselves; ``tests/test_gpu_peaks.py`` compares cards with units times clock.
"""

from typing import NamedTuple


class Peak(NamedTuple):
    """Floating-point operations per second."""

    half: float
    """float16 and bfloat16."""
    single: float
    """float32: TF32 where there is one, which PyTorch's convolutions take unless told otherwise;
    its matrix products do not, so a ViT in float32 reaches less."""


# A part of the name that the driver gives, as torch.cuda.get_device_name does; first match counts.
PEAKS = {
    "B200": Peak(2250e12, 1125e12),
    "H200 NVL": Peak(835.5e12, 417.5e12),
    "H200": Peak(989.5e12, 494.5e12),
    "H100 NVL": Peak(835.5e12, 417.5e12),
    "H100 PCIe": Peak(756.5e12, 378e12),
    "H100": Peak(989.5e12, 494.5e12),
    "A100": Peak(312e12, 156e12),
    "A40": Peak(149.7e12, 74.8e12),
    "L40S": Peak(362e12, 183e12),
    "L4": Peak(121e12, 60e12),
    "V100-PCIE": Peak(112e12, 14e12),
    "V100": Peak(125e12, 15.7e12),
    "T4": Peak(65e12, 8.1e12),
}

# Older than bfloat16 in their matrix units.
FLOAT16_ONLY = {"V100-PCIE", "V100", "T4"}


def peak_of(gpu: str, precision: str) -> float | None:
    """Operations per second that a GPU could do at most; None where that is not listed.

    Args:
        gpu: its name, or a part of it that says which one: ``H100``, ``NVIDIA A100-SXM4-80GB``.
        precision: of train.py: no, bf16 or fp16.
    """
    words = gpu.upper().replace("-", " ").split()
    for name, peak in PEAKS.items():
        wanted = name.upper().replace("-", " ").split()
        if all(word in words for word in wanted):
            if precision == "bf16" and name in FLOAT16_ONLY:
                return None
            return peak.single if precision == "no" else peak.half
    return None
