"""Keys of the batch, with and without gradient, against slow forms; two processes against one."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from model.collectives import average, is_distributed, rank, world_size
from model.encoder import EncoderConfig
from model.end_to_end import BatchKeys, EndToEnd
from model.mechanism import chance_loss, loss_scale
from model.moco import MoCo, MoCoConfig
from tests.run_in_processes import run_in_processes

BATCH, T = 8, 0.3
ENCODER = EncoderConfig(backbone="test_resnet", dim=6)


def unit_rows(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)
    return F.normalize(rows, dim=1)


def slow_loss(query_BD, key_BD):
    losses = []
    for place, query_D in enumerate(query_BD):
        logits = torch.stack([torch.dot(query_D, key_D) / T for key_D in key_BD])
        losses.append(-logits[place] + logits.exp().sum().log())
    return sum(losses) / len(losses)


def share_of(rows):
    share = BATCH // world_size()
    return rows[rank() * share : (rank() + 1) * share]


def loss_and_gradients():
    query_ND, key_ND = (share_of(unit_rows(seed)).requires_grad_() for seed in (1, 2))
    loss, accuracy = BatchKeys().contrast([(query_ND, key_ND)], T, None, 0)
    loss.backward()
    means = [loss.detach(), accuracy]
    average(means)
    return means[0].item(), means[1].item(), query_ND.grad, key_ND.grad


@pytest.mark.parametrize("world", [1, 2, 4])
def test_loss_and_gradients_of_queries_and_keys_are_those_of_the_slow_form(world):
    query_BD, key_BD = (unit_rows(seed).requires_grad_() for seed in (1, 2))
    expected = slow_loss(query_BD, key_BD)
    expected.backward()
    hits = (query_BD @ key_BD.T).argmax(dim=1) == torch.arange(BATCH)
    ranks = [loss_and_gradients()] if world == 1 else run_in_processes(world, loss_and_gradients)
    for loss, accuracy, _, _ in ranks:
        assert loss == pytest.approx(expected.item())
        assert accuracy == pytest.approx(hits.double().mean().item())
    # The data-parallel wrapper averages gradients, so what is summed here is divided there.
    for place, leaf in ((2, query_BD), (3, key_BD)):
        gathered = torch.cat([found[place] for found in ranks]) / world
        torch.testing.assert_close(gathered, leaf.grad)


def test_equal_similarities_give_log_b():
    rows = F.normalize(torch.ones(BATCH, 6), dim=1)
    loss, _ = BatchKeys().contrast([(rows, rows)], T, None, 0)
    assert loss.item() == pytest.approx(math.log(BATCH), abs=1e-6)
    assert BatchKeys().candidates(BATCH) == BATCH


def make(kind, **settings):
    torch.manual_seed(0)
    config = MoCoConfig(**{"batch_norm_groups": 2, "momentum": 0.9, **settings})
    return kind(ENCODER, config, global_batch=BATCH, seed=0).double()


def parameters_after(kind, steps, settings):
    """Losses and parameters after some steps on this rank's share."""
    network, dictionary = make(kind, **settings), BatchKeys()
    wrapped = network
    if is_distributed():
        wrapped = DistributedDataParallel(network, broadcast_buffers=False)
    optimizer = torch.optim.SGD(network.trained_parameters(), lr=0.05)
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        options = {"generator": generator, "dtype": torch.float64}
        views = [share_of(torch.randn(BATCH, 3, 32, 32, **options)) for _ in range(2)]
        loss, _ = dictionary.contrast(wrapped(*views, step), T, None, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = [loss.detach().clone()]
        average(mean)
        losses.append(mean[0].item())
    return losses, [parameter.detach() for parameter in network.parameters()]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (EndToEnd, {}),
        (EndToEnd, {"symmetric": True}),
        (EndToEnd, {"batch_norm": "sync"}),
        (MoCo, {"symmetric": True, "predictor": True, "batch_norm": "sync"}),
    ],
    ids=str,
)
def test_two_processes_train_as_one(kind, settings):
    losses, parameters = parameters_after(kind, 3, settings)
    for found_losses, found in run_in_processes(2, parameters_after, kind, 3, settings):
        assert found_losses == pytest.approx(losses, rel=1e-7)
        for a, b in zip(found, parameters, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_queries_and_keys_are_of_one_encoder_and_both_have_gradients():
    network = make(EndToEnd, batch_norm="none")
    assert [name for name, _ in network.named_children()] == ["encoder_q"]
    view = torch.randn(BATCH, 3, 32, 32, dtype=torch.float64)
    ((query_ND, key_ND),) = network(view, view, 0)
    torch.testing.assert_close(query_ND, key_ND)
    assert query_ND.requires_grad
    assert key_ND.requires_grad
    twin = copy.deepcopy(network)
    loss, _ = BatchKeys().contrast(network(view, view.flip(3), 0), T, None, 0)
    loss.backward()
    ((query_ND, key_ND),) = twin(view, view.flip(3), 0)
    BatchKeys().contrast([(query_ND, key_ND.detach())], T, None, 0)[0].backward()
    pairs = zip(network.parameters(), twin.parameters(), strict=True)
    assert any(not torch.allclose(a.grad, b.grad) for a, b in pairs)


def test_moco_v3_is_its_own_algorithm_1():
    """Section 3 of https://arxiv.org/abs/2104.02057: predictor, both ways, loss times 2 T."""
    settings = {"symmetric": True, "predictor": True, "batch_norm": "sync", "loss_2t": True}
    moco = make(MoCo, mechanism="batch", **settings)
    f_q, f_k, h = (copy.deepcopy(net) for net in (moco.encoder_q, moco.encoder_k, moco.predictor))
    x1, x2 = torch.randn(2, BATCH, 3, 32, 32, dtype=torch.float64)
    moco.momentum = 0.7
    for parameter in [*moco.encoder_q.parameters(), *f_q.parameters()]:
        parameter.data.mul_(1.25)  # so that the key encoder has a way to go
    q1, q2 = (F.normalize(h(f_q.projection(x)), dim=1) for x in (x1, x2))
    with torch.no_grad():
        for parameter_k, parameter_q in zip(f_k.parameters(), f_q.parameters(), strict=True):
            parameter_k.copy_(0.7 * parameter_k + 0.3 * parameter_q)
        k1, k2 = (F.normalize(f_k.projection(x), dim=1) for x in (x1, x2))
    expected = 2 * T * (slow_loss(q1, k2) + slow_loss(q2, k1))
    config = MoCoConfig(temperature=T, **settings)
    loss, _ = BatchKeys().contrast(moco(x1, x2, 0), T, None, 0)
    loss = loss * loss_scale(config)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for ours, theirs in ((moco.encoder_q, f_q), (moco.predictor, h)):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    assert chance_loss(config, BATCH) == pytest.approx(2 * 2 * T * math.log(BATCH))
