"""A timm ViT as MoCo v3 trains it: fixed positions, a random patch projection that stays.

Source: Chen, Xie, He 2021, https://arxiv.org/abs/2104.02057, section 4 and appendix A.

Letters in names: L patches of a picture, E width of the ViT.
"""

import math
from typing import Any

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


def has_plain_tokens(vit: nn.Module) -> bool:
    """Whether its tokens are one class token and one per patch, each with a position."""
    if type(vit) is not VisionTransformer or vit.cls_token is None or vit.pos_embed is None:
        return False
    patches: Any = vit.patch_embed
    has_positions = vit.pos_embed.shape[1] == 1 + patches.num_patches  # type: ignore[index]
    return bool(has_positions) and isinstance(getattr(patches, "proj", None), nn.Conv2d)


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """The class token's zeros, then sine and cosine of row and column, ``[1, 1 + L, E]``.

    Each row of the table is sin(y w), cos(y w), sin(x w), cos(x w) with the E / 4 frequencies
    w = 10000^(-4 i / E).

    Args:
        grid: patches in a column and in a row.
        width: E, a multiple of 4.
    """
    table_LE = build_sincos2d_pos_embed(list(grid), width, interleave_sin_cos=True)
    return torch.cat([torch.zeros(1, width), table_LE]).unsqueeze(0)


@torch.no_grad()
def prepare_vit(vit: VisionTransformer, *, frozen_patches: bool) -> None:
    """Give a ViT the fixed positions and the first patch projection of MoCo v3, in place.

    The rest of its initialisation is timm's ``weight_init="moco"``: Xavier, with query, key and
    value as matrices of their own.

    Args:
        vit: with ``has_plain_tokens``.
        frozen_patches: the projection gets no gradient; the paper's cure for the instability of
            training, figure 5.
    """
    width = vit.embed_dim
    positions = sincos_positions(vit.patch_embed.grid_size, width)
    vit.pos_embed = nn.Parameter(positions.to(vit.pos_embed.device), requires_grad=False)
    projection = vit.patch_embed.proj
    # Xavier for the projection as the matrix that it is, [E, 3 * side * side], not per position.
    bound = math.sqrt(6 / (projection.weight[0].numel() + width))
    nn.init.uniform_(projection.weight, -bound, bound)
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)
    projection.requires_grad_(not frozen_patches)
