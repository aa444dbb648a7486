"""The numbers of each recipe as they were published.

Sources: v1 https://arxiv.org/abs/1911.05722, sections 3.3 and 4, and the defaults of the official
main_moco.py; v2 https://arxiv.org/abs/2003.04297 and the flags of the official README; cifar10 the
authors' notebook.
"""

import json
import math

import pytest
import torch
from torch import nn

from eval.run_config import RECIPES, TrainConfig
from model.encoder import Encoder
from model.optimiser import make_optimiser
from model.schedule import lr_at
from pipeline.settings import from_plain, to_plain

IMAGENET_PICTURES = 1_281_167
CIFAR10_PICTURES = 50_000


def numbers_of(recipe):
    """What section 3.3 of the paper and the official defaults name, of one of our recipes."""
    config = RECIPES[recipe]
    encoder, moco, optimiser = config.encoder, config.moco, config.optimiser
    return {
        "backbone": (encoder.backbone, encoder.layers, encoder.stem),
        "head": (encoder.head, encoder.dim),
        "K, m, T": (moco.queue, moco.momentum, moco.temperature),
        "batch norm": (moco.batch_norm, moco.batch_norm_groups),
        "SGD": (optimiser.lr, optimiser.momentum, optimiser.weight_decay),
        "schedule": optimiser.schedule,
        "batch, epochs": (config.batch, config.epochs),
        "precision": config.precision,
        "views": (config.data.views, config.data.image_px),
    }


def test_moco_v1_is_the_published_recipe():
    assert numbers_of("moco-v1") == {
        "backbone": ("resnet50", None, "imagenet"),
        "head": ("linear", 128),
        "K, m, T": (65536, 0.999, 0.07),
        "batch norm": ("shuffle", 8),
        "SGD": (0.03, 0.9, 1e-4),
        "schedule": "steps",
        "batch, epochs": (256, 200),
        "precision": "no",
        "views": ("moco-v1", 224),
    }
    optimiser = RECIPES["moco-v1"].optimiser
    assert [milestone * 200 for milestone in optimiser.milestones] == [120, 160]
    assert optimiser.factor == 0.1


def test_moco_v2_is_the_published_recipe():
    assert numbers_of("moco-v2") == {
        "backbone": ("resnet50", None, "imagenet"),
        "head": ("mlp", 128),
        "K, m, T": (65536, 0.999, 0.2),
        "batch norm": ("shuffle", 8),
        "SGD": (0.03, 0.9, 1e-4),
        "schedule": "cosine",
        "batch, epochs": (256, 200),
        "precision": "no",
        "views": ("moco-v2", 224),
    }


def test_cifar10_is_the_authors_notebook():
    assert numbers_of("cifar10") == {
        "backbone": ("resnet18", None, "cifar"),
        "head": ("linear", 128),
        "K, m, T": (4096, 0.99, 0.1),
        "batch norm": ("shuffle", 8),
        "SGD": (0.06, 0.9, 5e-4),
        "schedule": "cosine",
        "batch, epochs": (512, 200),
        "precision": "no",
        "views": ("cifar10", 32),
    }
    data = RECIPES["cifar10"].data
    assert (data.mean, data.std) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


@pytest.mark.parametrize("recipe", ["moco-v1", "moco-v2"])
def test_the_imagenet_recipes_normalise_as_torchvision(recipe):
    data = RECIPES[recipe].data
    assert (data.mean, data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert data.eval_resize_px == 256


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_survives_the_way_through_json(recipe):
    config = RECIPES[recipe]
    plain = json.loads(json.dumps(to_plain(config)))
    assert from_plain(TrainConfig, plain, "here") == config
    assert config.recipe == recipe


# What follows from the numbers -------------------------------------------------------------------


def lr_of_epoch(recipe, epoch, pictures):
    """The rate at the first and the last step of an epoch, which are the same."""
    config = RECIPES[recipe]
    per_epoch = pictures // config.batch
    steps = (epoch * per_epoch, (epoch + 1) * per_epoch - 1)
    total = round(config.epochs) * per_epoch
    first, last = (lr_at(config.optimiser, s, total, per_epoch, config.batch) for s in steps)
    assert first == last
    return first


@pytest.mark.parametrize(
    ("epoch", "lr"), [(0, 0.03), (119, 0.03), (120, 0.003), (160, 0.0003), (199, 0.0003)]
)
def test_the_rate_of_moco_v1_falls_tenfold_after_120_and_160_epochs(epoch, lr):
    assert lr_of_epoch("moco-v1", epoch, IMAGENET_PICTURES) == pytest.approx(lr)


@pytest.mark.parametrize("epoch", [0, 1, 50, 100, 199])
def test_the_rate_of_moco_v2_is_a_cosine_of_the_epoch(epoch):
    expected = 0.03 * 0.5 * (1 + math.cos(math.pi * epoch / 200))
    assert lr_of_epoch("moco-v2", epoch, IMAGENET_PICTURES) == pytest.approx(expected)


@pytest.mark.parametrize("epoch", [0, 1, 50, 100, 199])
def test_the_rate_of_cifar10_is_a_cosine_of_the_epoch(epoch):
    expected = 0.06 * 0.5 * (1 + math.cos(math.pi * epoch / 200))
    assert lr_of_epoch("cifar10", epoch, CIFAR10_PICTURES) == pytest.approx(expected)


HEADS = {
    "moco-v1": {"weight": (128, 2048), "bias": (128,)},
    "moco-v2": {
        "0.weight": (2048, 2048),
        "0.bias": (2048,),
        "2.weight": (128, 2048),
        "2.bias": (128,),
    },
    "cifar10": {"weight": (128, 512), "bias": (128,)},
}


@pytest.mark.parametrize("recipe", HEADS)
def test_the_head_has_the_shapes_of_the_official_checkpoints(recipe):
    with torch.device("meta"):
        head = Encoder(RECIPES[recipe].encoder).head
    assert {name: tuple(t.shape) for name, t in head.state_dict().items()} == HEADS[recipe]


@pytest.mark.parametrize(
    ("recipe", "weight_decay"), [("moco-v1", 1e-4), ("moco-v2", 1e-4), ("cifar10", 5e-4)]
)
def test_weight_decay_is_on_all_parameters_batch_norm_and_biases_too(recipe, weight_decay):
    with torch.device("meta"):
        encoder = Encoder(RECIPES[recipe].encoder)
    optimizer = make_optimiser(RECIPES[recipe].optimiser, encoder.parameters())
    assert type(optimizer) is torch.optim.SGD
    decayed = {
        id(p)
        for g in optimizer.param_groups
        for p in g["params"]
        if g["weight_decay"] == weight_decay
    }
    assert decayed == {id(parameter) for parameter in encoder.parameters()}
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {id(norm.bias) for norm in norms} <= decayed


def test_the_cifar10_encoder_keeps_32_pixels_until_its_second_stage():
    with torch.device("meta"):
        backbone = Encoder(RECIPES["cifar10"].encoder).backbone
    assert backbone.conv1.kernel_size == (3, 3)
    assert backbone.conv1.stride == (1, 1)
    assert isinstance(backbone.maxpool, nn.Identity)
