"""Small tensors between host and device, without either waiting for the other.

A plain ``tensor.to(device)`` from pageable memory, and every ``item()``, waits until the device has
done all it was given before.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device; on the device's stream it is there when it is asked for."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def fetch(flag: Tensor) -> Callable[[], bool]:
    """Begin to bring one truth value to the host.

    Args:
        flag: of one element, not to be changed before the answer is there.

    Returns:
        What waits for it, and for nothing that the device was given later.
    """
    if not flag.is_cuda:
        return lambda: bool(flag)
    on_host = torch.empty(flag.shape, dtype=flag.dtype, pin_memory=True)
    on_host.copy_(flag, non_blocking=True)
    there = torch.cuda.Event()
    there.record()

    def answer() -> bool:
        there.synchronize()
        return bool(on_host)

    return answer
