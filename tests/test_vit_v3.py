"""The ViT of MoCo v3: heads, positions, first weights, the projection that stays."""

import math

import pytest
import torch

from model.encoder import Encoder, EncoderConfig, EncoderError, make_backbone
from model.vit_v3 import sincos_positions

TINY = EncoderConfig(backbone="test_vit", head="v3", dim=16, hidden=32)


def test_the_vit_small_has_12_heads_of_32_and_the_positions_of_224_pixels():
    with torch.device("meta"):
        vit = make_backbone(EncoderConfig(backbone="vit_small_patch16_224", heads=12))
    assert (vit.blocks[0].attn.num_heads, vit.blocks[0].attn.head_dim) == (12, 32)
    assert len(vit.blocks) == 12
    assert vit.pos_embed.shape == (1, 197, 384)


def test_positions_are_the_published_formula():
    table = sincos_positions((3, 5), 8)
    assert table.shape == (1, 16, 8)
    assert (table[0, 0] == 0).all()  # the class token has none
    for y in range(3):
        for x in range(5):
            expected = [
                function(place * 10_000 ** -(i / 2))
                for place in (y, x)
                for function in (math.sin, math.cos)
                for i in range(2)
            ]
            got = table[0, 1 + 5 * y + x].tolist()
            assert got == pytest.approx(expected, abs=1e-6)


def test_positions_and_patch_projection_get_no_gradient_and_the_rest_does():
    encoder = Encoder(TINY, image_px=32)
    encoder(torch.randn(4, 3, 32, 32)).square().sum().backward()
    without = {name for name, p in encoder.named_parameters() if p.grad is None}
    frozen = {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert without == {f"backbone.{name}" for name in frozen}


def test_the_patch_projection_can_be_trained():
    config = EncoderConfig(backbone="test_vit", frozen_patches=False)
    assert make_backbone(config, 32).patch_embed.proj.weight.requires_grad
    assert not make_backbone(config, 32).pos_embed.requires_grad


def test_first_weights_are_xavier_with_query_key_and_value_apart():
    torch.manual_seed(0)
    vit = make_backbone(EncoderConfig(backbone="vit_tiny_patch16_224"))
    width = 192
    limits = {
        "patch_embed.proj": 3 * 16 * 16 + width,
        "blocks.3.attn.qkv": 2 * width,
        "blocks.3.attn.proj": 2 * width,
        "blocks.3.mlp.fc1": 5 * width,
    }
    for name, fans in limits.items():
        layer = vit.get_submodule(name)
        bound = math.sqrt(6 / fans)
        assert 0.99 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert (layer.bias == 0).all()


def test_features_are_the_normalised_class_token():
    vit = make_backbone(TINY, 64).eval()
    views = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(vit(views), vit.forward_features(views)[:, 0])


@pytest.mark.parametrize(
    ("config", "image_px", "message"),
    [
        (EncoderConfig(backbone="vit_small_patch16_224"), 100, r"100 px .* multiple of 16"),
        (EncoderConfig(backbone="vit_small_patch16_224", heads=7), 224, r"--encoder\.heads 7"),
        (EncoderConfig(backbone="vit_small_patch14_reg4_dinov2"), 224, "use a plain ViT"),
        (EncoderConfig(backbone="vit_small_patch16_224", width=2), 224, r"--encoder\.width is for"),
        (EncoderConfig(backbone="vit_small_patch16_224", stem="cifar"), 224, r"--encoder\.stem"),
        (EncoderConfig(backbone="resnet18", heads=12), 224, r"--encoder\.heads is for ViTs"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(config, image_px, message):
    with torch.device("meta"), pytest.raises(EncoderError, match=message) as caught:
        make_backbone(config, image_px)
    assert "\n" not in str(caught.value)
