"""The network: names and shapes of the official checkpoints, stems, heads, refusals."""

import pytest
import torch
import torchvision

from model.encoder import Encoder, EncoderConfig, EncoderError

TINY = EncoderConfig(backbone="test_resnet", dim=16)


def shapes(network, prefix=""):
    named = network.state_dict().items()
    return {name: tuple(t.shape) for name, t in named if name.startswith(prefix)}


@pytest.mark.parametrize("groups", [1, 8])
def test_resnet50_has_the_318_names_and_shapes_of_torchvision_without_the_classifier(groups):
    with torch.device("meta"):
        ours = shapes(Encoder(EncoderConfig(backbone="resnet50"), groups).backbone)
        theirs = shapes(torchvision.models.resnet50())
    assert len(ours) == 318
    assert ours == {name: shape for name, shape in theirs.items() if not name.startswith("fc.")}


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (EncoderConfig(backbone="resnet50"), 23.5),
        (EncoderConfig(backbone="resnet50", width=2), 93.9),  # the paper: 94 M
        (EncoderConfig(backbone="resnet50", width=4), 375.4),  # the paper: 375 M
        (EncoderConfig(backbone="resnext50_32x8d"), 46.0),  # the paper: 46 M
        (EncoderConfig(backbone="resnext101_32x8d"), 86.7),
    ],
    ids=lambda value: (
        f"{value.backbone}-w{value.width}" if isinstance(value, EncoderConfig) else ""
    ),
)
def test_the_networks_of_the_paper_have_their_numbers_of_parameters(config, millions):
    with torch.device("meta"):
        count = sum(p.numel() for p in Encoder(config).backbone.parameters())
    assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_a_wide_network_has_the_names_of_the_narrow_one_and_each_width_doubled(name):
    with torch.device("meta"):
        narrow = shapes(Encoder(EncoderConfig(backbone=name)).backbone)
        wide = shapes(Encoder(EncoderConfig(backbone=name, width=2)).backbone)
    assert wide.keys() == narrow.keys()
    for key, shape in narrow.items():
        doubled = tuple(2 * size for size in shape[:2])
        if key == "conv1.weight":
            doubled = (2 * shape[0], 3)
        assert wide[key] == doubled + shape[2:], key


def test_a_wide_stem_starts_with_the_spread_of_the_other_layers():
    torch.manual_seed(0)
    backbone = Encoder(EncoderConfig(backbone="resnet18", width=2)).backbone
    fan_out = 128 * 7 * 7
    assert backbone.conv1.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)
    assert backbone.eval()(torch.randn(2, 3, 64, 64)).shape == (2, 1024)


def test_the_mlp_head_is_linear_relu_linear():
    head = Encoder(TINY).head
    features = torch.randn(5, 96)
    by_hand = (features @ head[0].weight.T + head[0].bias).clamp(min=0)
    torch.testing.assert_close(head(features), by_hand @ head[2].weight.T + head[2].bias)


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 1), ("small", 2), ("cifar", 4)])
def test_a_stem_decides_how_much_of_a_32_pixel_picture_is_left(stem, side):
    with torch.device("meta"):
        backbone = Encoder(EncoderConfig(backbone="resnet18", stem=stem)).backbone.eval()
        assert backbone.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 512, side, side)


def test_the_stages_may_have_other_numbers_of_blocks():
    with torch.device("meta"):
        backbone = Encoder(EncoderConfig(backbone="resnet18", layers=(1, 2, 1, 3))).backbone
    assert [len(getattr(backbone, f"layer{i}")) for i in (1, 2, 3, 4)] == [1, 2, 1, 3]


@pytest.mark.parametrize("option", [{"width": 2}, {"stem": "cifar"}], ids=str)
def test_a_deep_stem_is_neither_widened_nor_replaced(option):
    with torch.device("meta"), pytest.raises(EncoderError, match="'resnet50d' has a stem of"):
        Encoder(EncoderConfig(backbone="resnet50d", **option))


@pytest.mark.parametrize("name", ["dim", "hidden", "width"])
def test_a_size_below_one_is_named_with_its_flag(name):
    with pytest.raises(EncoderError, match=rf"--encoder\.{name} 0: give"):
        EncoderConfig(**{name: 0})


@pytest.mark.parametrize("layers", [(1, 1), (1, 1, 1, 1, 1), (1, 1, 1, 0), (1, 1, 1, -1)], ids=str)
def test_numbers_of_blocks_that_are_not_four_positive_ones_are_refused(layers):
    with pytest.raises(EncoderError, match=r"--encoder\.layers"):
        Encoder(EncoderConfig(backbone="resnet18", layers=layers))


def test_no_block_starts_as_the_identity():
    encoder = Encoder(EncoderConfig(backbone="resnet18"))
    scales = {n: t for n, t in encoder.named_parameters() if "bn" in n and n.endswith("weight")}
    assert "backbone.layer4.1.bn2.weight" in scales
    assert all((scale == 1).all() for scale in scales.values())


def test_a_block_can_start_as_the_identity():
    encoder = Encoder(EncoderConfig(backbone="resnet18", zero_init_residual=True))
    scales = {n: t for n, t in encoder.named_parameters() if "bn" in n and n.endswith("weight")}
    is_zero = {name for name, scale in scales.items() if (scale == 0).all()}
    assert is_zero == {f"backbone.layer{s}.{b}.bn2.weight" for s in (1, 2, 3, 4) for b in (0, 1)}


def test_an_embedding_is_the_projection_at_length_one():
    encoder, views = Encoder(TINY).eval(), torch.randn(6, 3, 32, 32)
    projection = encoder.projection(views)
    torch.testing.assert_close(encoder(views), projection / projection.norm(dim=1, keepdim=True))


def test_the_weights_are_a_function_of_the_global_seed():
    def first(seed):
        torch.manual_seed(seed)
        return Encoder(TINY).backbone.conv1[0].weight

    assert torch.equal(first(3), first(3))
    assert not torch.equal(first(3), first(4))


def test_embeddings_are_float32_of_length_one_whatever_the_precision_of_the_arithmetic():
    encoder, views = Encoder(TINY), torch.randn(6, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder.features(views).shape == (6, 96)
        embedding_ND = encoder(views)
    assert embedding_ND.dtype == torch.float32
    torch.testing.assert_close(embedding_ND.norm(dim=1), torch.ones(6))


def test_features_are_what_the_backbone_pools_and_not_normalised():
    encoder, views = Encoder(TINY).eval(), torch.randn(6, 3, 64, 64)
    pooled = encoder.backbone.forward_features(views).mean(dim=(2, 3))
    torch.testing.assert_close(encoder.features(views), pooled)


def test_an_unknown_backbone_is_answered_with_near_names():
    with pytest.raises(EncoderError, match=r"timm has no backbone 'resnt50'.*resnet50"):
        Encoder(EncoderConfig(backbone="resnt50"))


NEITHER = ["deit3_small_patch16_224", "vit_base_resnet50d_224", "inception_resnet_v2",
               "legacy_seresnet18", "nf_resnet26"]  # fmt: skip


@pytest.mark.parametrize("backbone", NEITHER)
def test_a_backbone_that_is_neither_resnet_nor_vit_is_refused(backbone):
    with pytest.raises(EncoderError, match=f"'{backbone}' is neither a ResNet nor a plain ViT"):
        Encoder(EncoderConfig(backbone=backbone))


@pytest.mark.parametrize("stem", ["cifar", "small"])
def test_a_stem_of_several_layers_cannot_be_replaced(stem):
    with pytest.raises(EncoderError, match=f"'resnet18d' has a stem of several .* {stem!r} stem"):
        Encoder(EncoderConfig(backbone="resnet18d", stem=stem))
