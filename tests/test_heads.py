"""The heads of v1, v2 and v3: names and shapes of the official checkpoints."""

import pytest
import torch
from torch import nn

from model.encoder import Encoder, EncoderConfig, is_vit
from model.heads import make_head, make_predictor

NORM = ("weight", "bias", "running_mean", "running_var")
VIT_S = EncoderConfig(backbone="vit_small_patch16_224", heads=12, head="v3", dim=256)
R50 = EncoderConfig(backbone="resnet50", head="v3", dim=256)


def shapes(network):
    return {name: tuple(t.shape) for name, t in network.state_dict().items()}


def batch_norm(number, width, names=NORM):
    return {f"{number}.{name}": (width,) for name in names} | {f"{number}.num_batches_tracked": ()}


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("linear", {"weight": (128, 2048), "bias": (128,)}),
        ("mlp", {"0.weight": (2048, 2048), "0.bias": (2048,), "2.weight": (128, 2048),
                 "2.bias": (128,)}),
    ],
)  # fmt: skip
def test_the_heads_of_v1_and_v2_have_the_official_shapes(head, expected):
    assert shapes(make_head(head, 2048, 128, hidden=4096, is_vit=False)) == expected


def test_the_projector_of_v3_on_a_resnet50_has_the_official_shapes():
    with torch.device("meta"):
        head = Encoder(R50).head
    assert shapes(head) == {
        "0.weight": (4096, 2048),
        **batch_norm(1, 4096),
        "3.weight": (256, 4096),
        **batch_norm(4, 256, NORM[2:]),
    }


def test_the_projector_of_v3_on_a_vit_has_the_official_shapes():
    with torch.device("meta"):
        head = Encoder(VIT_S).head
    assert shapes(head) == {
        "0.weight": (4096, 384),
        **batch_norm(1, 4096),
        "3.weight": (4096, 4096),
        **batch_norm(4, 4096),
        "6.weight": (256, 4096),
        **batch_norm(7, 256, NORM[2:]),
    }


@pytest.mark.parametrize("on_vit", [False, True])
def test_the_predictor_of_v3_ends_with_batch_norm_on_a_vit_only(on_vit):
    last = batch_norm(4, 256, NORM[2:]) if on_vit else {}
    predictor = make_predictor(256, hidden=4096, is_vit=on_vit)
    expected = {"0.weight": (4096, 256), **batch_norm(1, 4096), "3.weight": (256, 4096)}
    assert shapes(predictor) == expected | last


def test_a_projector_is_linear_norm_relu_and_ends_without_relu():
    head = make_head("v3", 6, 4, hidden=5, is_vit=True).double()
    rows = x = torch.randn(9, 6, dtype=torch.float64)
    for number in (0, 3, 6):
        x = x @ head[number].weight.T
        x = (x - x.mean(dim=0)) / (x.var(dim=0, unbiased=False) + 1e-5).sqrt()
        x = x.clamp(min=0) if number < 6 else x
    torch.testing.assert_close(head(rows), x)


def test_the_encoder_knows_which_projector_it_needs():
    with torch.device("meta"):
        assert is_vit(Encoder(VIT_S).backbone)
        assert not is_vit(Encoder(R50).backbone)
        assert sum(isinstance(m, nn.Linear) for m in Encoder(R50).head) == 2
