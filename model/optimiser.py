"""The optimiser of each recipe."""

from collections.abc import Iterable

import torch
from torch import nn

from model.lars import Lars
from model.schedule import OptimiserConfig


def make_optimiser(
    config: OptimiserConfig, parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """SGD (MoCo v1, v2), LARS (v3 on a ResNet) or AdamW (v3 on a ViT) over what is trained.

    All are fused: one pass over the memory, and where a tensor ``found_inf``, set on the optimiser,
    is 1, a step changes nothing, without the host being asked.

    Args:
        config: its numbers; the learning rate is set anew before each step, by ``lr_at``.
        parameters: on their device; those without gradient, as frozen patches, are left out.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if config.name == "lars":
        return Lars(
            trained, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    if config.name == "adamw":
        return torch.optim.AdamW(
            trained,
            lr=config.lr,
            betas=(config.momentum, 0.999),
            weight_decay=config.weight_decay,
            fused=True,
        )
    sgd = torch.optim.SGD(
        trained,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=True,
    )
    for parameter in trained:  # a first step that is left out would leave memory as it was found
        sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd
