"""Operations of a step against the sum over layers, written out."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from eval.recipes import RECIPES
from model.encoder import Encoder
from model.step_flops import flops_of_step

DEMO = RECIPES["demo"]


def products_of(encoder, image_px):
    """Operations of one picture in each layer with a matrix, from the shapes that it really has."""
    found = []

    def add(layer, _, out):
        places = out[0, 0].numel() if isinstance(layer, nn.Conv2d) else 1
        found.append(2 * places * layer.weight.numel())

    for layer in encoder.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(add)
    encoder(torch.zeros(2, 3, image_px, image_px))
    return found


def test_a_step_of_the_queue_is_two_forwards_one_backward_and_the_similarities():
    layers = products_of(Encoder(DEMO.encoder), 32)
    found = flops_of_step(DEMO.encoder, DEMO.moco, 32, 64)
    assert found.forward == 2 * sum(layers)
    assert found.backward == 2 * sum(layers) - layers[0]  # none for the pictures themselves
    assert found.loss == 2 * 2 * 128 * (512 + 1)
    assert found.total == found.forward + found.backward + found.loss


def test_end_to_end_training_goes_backward_through_both_encoders():
    moco = replace(DEMO.moco, mechanism="end-to-end")
    queue, found = (flops_of_step(DEMO.encoder, m, 32, 64) for m in (DEMO.moco, moco))
    assert (found.forward, found.backward) == (queue.forward, 2 * queue.backward)
    assert found.loss == 3 * 2 * 128 * 64


def test_a_memory_bank_encodes_one_view():
    moco = replace(DEMO.moco, mechanism="memory-bank")
    queue, found = (flops_of_step(DEMO.encoder, m, 32, 64) for m in (DEMO.moco, moco))
    assert (2 * found.forward, found.backward) == (queue.forward, queue.backward)


def test_a_symmetric_step_is_two_steps():
    moco = replace(DEMO.moco, symmetric=True)
    queue, found = (flops_of_step(DEMO.encoder, m, 32, 64) for m in (DEMO.moco, moco))
    assert found.total == 2 * queue.total


def test_a_resnet50_has_the_published_4_09_billion_multiply_adds():
    # torchvision's documentation of ResNet50_Weights; the head replaces its classifier.
    recipe = RECIPES["moco-v2"]
    found = flops_of_step(recipe.encoder, recipe.moco, 224, 256)
    head = 2 * (2048 * 2048 + 2048 * 128)
    classifier = 2 * 2048 * 1000
    assert found.forward / 2 - head + classifier == pytest.approx(2 * 4.09e9, rel=1e-3)


def test_a_vit_keeps_its_patch_projection_and_counts_attention():
    recipe = RECIPES["moco-v3-vit-s"]
    found = flops_of_step(recipe.encoder, recipe.moco, 224, 4096)
    width, tokens, hidden = 384, 197, 4096
    patches = 2 * 196 * width * 768
    blocks = 12 * (2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width)
    head = 2 * (width * hidden + hidden * hidden + hidden * 256)
    predictor = 2 * (256 * hidden + hidden * 256)
    assert found.forward == 4 * (patches + blocks + head) + 2 * predictor
    assert found.backward == 2 * (2 * blocks + 2 * head + 2 * predictor)


def test_counting_draws_no_random_numbers():
    before = torch.get_rng_state()
    flops_of_step(DEMO.encoder, DEMO.moco, 32, 64)
    assert torch.equal(torch.get_rng_state(), before)
