"""``torch.compile`` for the encoders, and the way back where it does not work.

Compiling happens at the first call and fails for many reasons that are none of the run's: no C
compiler, a GPU that Triton does not know, an operation that cannot be traced. The run then goes on
with PyTorch's own kernels, as it would without the flag.

Letters in names: N images on this rank, H W pixels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from model.encoder import Encoder


def compile_encoders(
    network: nn.Module, say: Callable[[str], None], backend: str = "inductor"
) -> None:
    """Compile every encoder of a network, in place; names of its state stay.

    Args:
        network: with encoders as children.
        say: told once why it did not work.
        backend: of torch.compile.
    """
    told: list[str] = []

    def say_once(line: str) -> None:
        if not told:
            say(line)
        told.append(line)

    for encoder in network.children():
        if isinstance(encoder, Encoder):
            # The method of this one encoder, which forward and projection both go through.
            encoder.projection = or_plain(  # type: ignore[method-assign]
                encoder.projection, say_once, backend
            )


def or_plain(
    plain: Callable[..., Any], say: Callable[[str], None], backend: str
) -> Callable[..., Any]:
    """A compiled function that falls back to the plain one if its first call fails.

    A later failure is none of compiling (memory, a defect) and is raised.
    """
    compiled = torch.compile(plain, backend=backend)
    chosen: Callable[..., Any] | None = None

    def call(*arguments: Any) -> Any:
        nonlocal chosen
        if chosen is not None:
            return chosen(*arguments)
        try:
            result = compiled(*arguments)
            chosen = compiled
        except Exception as error:
            # The first line names the backend only.
            reason = " ".join(str(error).split("\n")[:2]).strip() or type(error).__name__
            result, chosen = plain(*arguments), plain
            # After the plain call: if that fails too, the reason is another.
            say(f"--compile is off, torch.compile failed: {reason}")
        return result

    return call
