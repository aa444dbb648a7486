"""The numbers of each recipe as they were published.

Sources: v1 https://arxiv.org/abs/1911.05722, sections 3.3 and 4, and the defaults of the official
main_moco.py; v2 https://arxiv.org/abs/2003.04297 and the flags of the official README; v3
https://arxiv.org/abs/2104.02057 and the commands of its official CONFIG.md with the defaults of its
main_moco.py; cifar10 the authors' notebook; imagenet-100 the row "Strong Aug. + MLP Head +
Cosine LR, 128, 0.03" in the README of SsnL/moco_align_uniform.
"""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from eval.recipes import RECIPES
from eval.run_arguments import parse_arguments
from eval.run_config import TrainConfig
from model.encoder import Encoder
from model.lars import Lars
from model.moco import MoCo
from model.optimiser import make_optimiser
from model.schedule import lr_at, momentum_at
from pipeline.settings import from_plain, to_plain
from pipeline.view_recipe import PAIRS

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


def test_moco_v1_on_a_billion_pictures_is_the_published_recipe():
    assert numbers_of("moco-v1-ig1b") == {
        **numbers_of("moco-v1"),
        "batch norm": ("shuffle", 64),
        "SGD": (0.12, 0.9, 1e-4),
        "schedule": "decay",
        "batch, epochs": (1024, 1.4),
    }
    config = RECIPES["moco-v1-ig1b"]
    assert config.steps == 1_250_000
    assert (config.optimiser.factor, config.optimiser.decay_steps) == (0.9, 62_500)
    assert config.optimiser.decay_steps * config.batch == 64_000_000
    assert config.steps * config.batch / 940e6 == pytest.approx(config.epochs, abs=0.05)


@pytest.mark.parametrize(
    ("recipe", "of", "changes"),
    [
        ("moco-v2-800", "moco-v2", {"batch, epochs": (256, 800)}),
        ("imagenet-100", "moco-v2", {"batch, epochs": (128, 200), "batch norm": ("shuffle", 4)}),
        ("cifar10-symmetric", "cifar10", {}),
    ],
)
def test_a_variant_differs_from_its_recipe_as_published(recipe, of, changes):
    assert numbers_of(recipe) == {**numbers_of(of), **changes}
    assert RECIPES[recipe].data == RECIPES[of].data
    assert RECIPES[recipe].moco.symmetric == (recipe == "cifar10-symmetric")


V3_RESNET = {
    "moco-v3-100": (100, 0.6, 1e-6, 0.99),
    "moco-v3-300": (300, 0.3, 1e-6, 0.99),
    "moco-v3-1000": (1000, 0.3, 1.5e-6, 0.996),
}
V3_VIT = {
    "moco-v3-vit-s": ("vit_small_patch16_224", 384),
    "moco-v3-vit-b": ("vit_base_patch16_224", 768),
}


def numbers_of_v3(recipe):
    """What the official commands and defaults name."""
    config = RECIPES[recipe]
    moco, optimiser = config.moco, config.optimiser
    return {
        "head": (config.encoder.head, config.encoder.dim, config.encoder.hidden),
        "loss": (moco.mechanism, moco.symmetric, moco.predictor, moco.loss_2t),
        "batch norm": moco.batch_norm,
        "momentum": moco.momentum_schedule,
        "rate": (optimiser.lr_batch, optimiser.schedule, optimiser.every),
        "optimiser's momentum": optimiser.momentum,
        "batch": config.batch,
        "precision": config.precision,
        "px": config.data.image_px,
    }


@pytest.mark.parametrize("recipe", [*V3_RESNET, *V3_VIT])
def test_moco_v3_is_the_published_method_on_every_backbone(recipe):
    assert numbers_of_v3(recipe) == {
        "head": ("v3", 256, 4096),
        "loss": ("batch", True, True, True),
        "batch norm": "sync",
        "momentum": "cosine",
        "rate": (256, "cosine", "step"),
        "optimiser's momentum": 0.9,
        "batch": 4096,
        "precision": "fp16",
        "px": 224,
    }


@pytest.mark.parametrize("recipe", V3_RESNET)
def test_moco_v3_on_a_resnet50_is_the_published_recipe_of_its_length(recipe):
    config = RECIPES[recipe]
    optimiser, moco = config.optimiser, config.moco
    found = (config.epochs, optimiser.lr, optimiser.weight_decay, moco.momentum)
    assert found == V3_RESNET[recipe]
    assert (optimiser.name, optimiser.warmup_epochs, moco.temperature) == ("lars", 10, 1.0)
    assert (config.encoder.backbone, config.encoder.zero_init_residual) == ("resnet50", True)
    assert [view.crop_area for view in PAIRS[config.data.views]] == [(0.2, 1.0)] * 2


@pytest.mark.parametrize("recipe", V3_VIT)
def test_moco_v3_on_a_vit_is_the_published_recipe(recipe):
    config = RECIPES[recipe]
    optimiser, encoder = config.optimiser, config.encoder
    assert (config.epochs, optimiser.lr, optimiser.weight_decay) == (300, 1.5e-4, 0.1)
    assert (optimiser.name, optimiser.warmup_epochs) == ("adamw", 40)
    assert (config.moco.momentum, config.moco.temperature) == (0.99, 0.2)
    assert (encoder.backbone, encoder.heads) == (V3_VIT[recipe][0], 12)
    assert encoder.frozen_patches
    assert [view.crop_area for view in PAIRS[config.data.views]] == [(0.08, 1.0)] * 2


@pytest.mark.parametrize("recipe", [*V3_RESNET, *V3_VIT])
def test_the_views_of_moco_v3_differ_in_blur_and_solarisation_only(recipe):
    first, second = PAIRS[RECIPES[recipe].data.views]
    assert (first.blur_probability, first.solarise_probability) == (1.0, 0.0)
    assert (second.blur_probability, second.solarise_probability) == (0.1, 0.2)
    assert first.jitter == (0.4, 0.4, 0.2, 0.1)
    alike = {"blur_probability": 0.0, "solarise_probability": 0.0}
    assert dataclasses.replace(first, **alike) == dataclasses.replace(second, **alike)


@pytest.mark.parametrize("recipe", ["moco-v1", "moco-v1-ig1b", "moco-v2", *V3_RESNET, *V3_VIT])
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


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ([], 1_250_000),
        (["--epochs", "3"], None),
        (["--epochs=3"], None),
        (["--steps", "7"], 7),
        (["--epochs", "3", "--steps", "7"], 7),
    ],
)
def test_epochs_that_are_given_win_over_the_steps_of_a_recipe(flags, steps):
    assert parse_arguments(["moco-v1-ig1b", *flags], "").run.steps == steps


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


@pytest.mark.parametrize(
    ("step", "decays"), [(0, 0), (62_499, 0), (62_500, 1), (625_000, 10), (1_249_999, 19)]
)
def test_the_rate_on_a_billion_pictures_falls_by_a_tenth_every_62500_steps(step, decays):
    config = RECIPES["moco-v1-ig1b"]
    lr = lr_at(config.optimiser, step, config.steps, 940_000_000 // 1024, config.batch)
    assert lr == pytest.approx(0.12 * 0.9**decays)


@pytest.mark.parametrize("epoch", [0, 1, 50, 100, 199])
def test_the_rate_of_moco_v2_is_a_cosine_of_the_epoch(epoch):
    expected = 0.03 * 0.5 * (1 + math.cos(math.pi * epoch / 200))
    assert lr_of_epoch("moco-v2", epoch, IMAGENET_PICTURES) == pytest.approx(expected)


@pytest.mark.parametrize("epoch", [0, 1, 50, 100, 199])
def test_the_rate_of_cifar10_is_a_cosine_of_the_epoch(epoch):
    expected = 0.06 * 0.5 * (1 + math.cos(math.pi * epoch / 200))
    assert lr_of_epoch("cifar10", epoch, CIFAR10_PICTURES) == pytest.approx(expected)


@pytest.mark.parametrize("recipe", [*V3_RESNET, *V3_VIT])
def test_the_rate_of_moco_v3_rises_from_zero_and_falls_on_a_cosine_of_the_step(recipe):
    config = RECIPES[recipe]
    per_epoch = IMAGENET_PICTURES // 4096
    total = config.epochs * per_epoch
    highest = config.optimiser.lr * 4096 / 256
    warm_up = config.optimiser.warmup_epochs * per_epoch

    def lr(step):
        return lr_at(config.optimiser, step, total, per_epoch, config.batch)

    assert lr(0) == 0
    assert lr(warm_up // 2) == pytest.approx(highest / 2, rel=1e-2)
    assert lr(warm_up) == pytest.approx(highest)
    assert lr((warm_up + total) // 2) == pytest.approx(highest / 2, rel=1e-2)
    last = (total - 1 - warm_up) / (total - warm_up)
    assert lr(total - 1) == pytest.approx(highest * 0.5 * (1 + math.cos(math.pi * last)))


@pytest.mark.parametrize(
    ("recipe", "share", "m"),
    [("moco-v3-300", 0, 0.99), ("moco-v3-300", 0.5, 0.995), ("moco-v3-300", 1, 1.0),
     ("moco-v3-1000", 0, 0.996), ("moco-v3-1000", 0.5, 0.998)],
)  # fmt: skip
def test_the_momentum_of_moco_v3_rises_to_one_on_a_cosine(recipe, share, m):
    moco = RECIPES[recipe].moco
    found = momentum_at(moco.momentum, round(share * 1000), 1000, moco.momentum_schedule)
    assert found == pytest.approx(m)


@pytest.mark.parametrize("recipe", [*V3_RESNET, *V3_VIT])
def test_the_predictor_of_moco_v3_has_the_shapes_of_the_official_checkpoints(recipe):
    with torch.device("meta"):
        network = MoCo(RECIPES[recipe].encoder, RECIPES[recipe].moco, 4096, 0)
    shapes = {name: tuple(t.shape) for name, t in network.predictor.state_dict().items()}
    assert shapes["0.weight"] == (4096, 256)
    assert shapes["1.running_var"] == (4096,)
    assert shapes["3.weight"] == (256, 4096)
    assert ("4.running_var" in shapes) == (recipe in V3_VIT)
    assert not {"0.bias", "3.bias", "4.weight"} & set(shapes)
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert {type(norm) for norm in norms} == {nn.SyncBatchNorm}
    if recipe in V3_VIT:
        assert network.encoder_q.backbone.num_features == V3_VIT[recipe][1]
        assert not network.encoder_q.backbone.patch_embed.proj.weight.requires_grad


@pytest.mark.parametrize(("recipe", "kind"), [("moco-v3-300", Lars), ("moco-v3-vit-s", AdamW)])
def test_the_optimiser_of_moco_v3_moves_encoder_and_predictor_and_nothing_else(recipe, kind):
    with torch.device("meta"):
        network = MoCo(RECIPES[recipe].encoder, RECIPES[recipe].moco, 4096, 0)
    optimizer = make_optimiser(RECIPES[recipe].optimiser, network.parameters())
    assert type(optimizer) is kind
    moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    of_queries = [*network.encoder_q.parameters(), *network.predictor.parameters()]
    assert moved == {id(parameter) for parameter in of_queries if parameter.requires_grad}


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
