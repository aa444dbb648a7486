"""MoCo, loss and queue against Algorithm 1 of the paper, written out slowly in float64.

What section 3.3 adds to it is written out too: batch norm in groups (as many GPUs have them) and
the shuffle of the keys among those. Nothing of the reference is vectorised over pictures or keys.
"""

import copy

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from model.batch_norm import SplitBatchNorm
from model.collectives import all_equal, average, is_distributed, rank, world_size
from model.encoder import EncoderConfig
from model.key_queue import KeyQueue
from model.moco import MoCo, MoCoConfig
from tests.run_in_processes import run_in_processes

ENCODER = EncoderConfig(backbone="test_resnet", dim=8)
BATCH, GROUPS, SEED, STEPS = 16, 4, 3, 50
LR, SGD_MOMENTUM, WEIGHT_DECAY = 0.02, 0.9, 1e-3
M, T = 0.9, 0.2


def views(step):
    """Two views of the pictures of a step, alike but not equal."""
    generator = torch.Generator().manual_seed(step)
    options = {"generator": generator, "dtype": torch.float64}
    picture_B3HW = torch.randn(BATCH, 3, 32, 32, **options)
    return [picture_B3HW + 0.3 * torch.randn(BATCH, 3, 32, 32, **options) for _ in range(2)]


def one_group(encoder):
    """An encoder whose batch norm takes all pictures of a call together."""
    encoder = copy.deepcopy(encoder)
    for module in encoder.modules():
        if isinstance(module, SplitBatchNorm):
            module.groups = 1
    return encoder


def encoded_in_groups(encoder, view_B3HW):
    """The embedding of each picture; each group is a call of its own, as on a GPU of its own."""
    embeddings = []
    for first in range(0, BATCH, BATCH // GROUPS):
        projected = encoder.projection(view_B3HW[first : first + BATCH // GROUPS])
        embeddings += [row_D / (row_D * row_D).sum().sqrt() for row_D in projected]
    return embeddings


def encoded_shuffled(encoder, view_B3HW, step, n=0):
    """The same for keys, whose groups hold other pictures than their queries'."""
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + step + n * 0x5BD1E995)
    order = torch.randperm(BATCH, generator=generator).tolist()
    shuffled = encoded_in_groups(encoder, torch.stack([view_B3HW[row] for row in order]))
    keys = [None] * BATCH
    for place, row in enumerate(order):
        keys[row] = shuffled[place]
    return keys


def cross_entropy(logits):
    """Of the first candidate."""
    highest = max(logit.item() for logit in logits)
    total = sum((logit - highest).exp() for logit in logits)
    return -(logits[0] - highest) + total.log()


def mean_loss(queries, keys, queue):
    """Of picking each query's own key; every query is compared with every key, one by one."""
    losses = []
    for query, positive in zip(queries, keys, strict=True):
        l_pos = torch.dot(query, positive)
        l_neg = [torch.dot(query, negative) for negative in queue]
        losses.append(cross_entropy([logit / T for logit in [l_pos, *l_neg]]))
    return sum(losses) / BATCH


def algorithm_1(encoder, rows_KD, steps, is_symmetric):
    """Algorithm 1; yields the loss, the gradients, the queue (oldest first) and f_k after it."""
    f_q, f_k = one_group(encoder), one_group(encoder)
    parameters_q, parameters_k = list(f_q.parameters()), list(f_k.parameters())
    velocity = [torch.zeros_like(parameter) for parameter in parameters_q]
    queue = list(rows_KD)
    for step in range(steps):
        x_q, x_k = views(step)
        q = encoded_in_groups(f_q, x_q)
        with torch.no_grad():
            k = encoded_shuffled(f_k, x_k, step)
        loss = mean_loss(q, k, queue)
        if is_symmetric:  # of the authors' CIFAR-10 notebook
            q_2 = encoded_in_groups(f_q, x_k)
            with torch.no_grad():
                k_2 = encoded_shuffled(f_k, x_q, step, n=1)
            loss = loss + mean_loss(q_2, k_2, queue)
            k = k + k_2
        gradients = torch.autograd.grad(loss, parameters_q)
        with torch.no_grad():
            for parameter, v, gradient in zip(parameters_q, velocity, gradients, strict=True):
                v.copy_(SGD_MOMENTUM * v + gradient + WEIGHT_DECAY * parameter)
                parameter.copy_(parameter - LR * v)
            for parameter_k, parameter_q in zip(parameters_k, parameters_q, strict=True):
                parameter_k.copy_(M * parameter_k + (1 - M) * parameter_q)
        for key in k:
            queue.append(key)
            queue.pop(0)
        yield loss.item(), gradients, torch.stack(queue), copy.deepcopy(parameters_k)


def ours(moco, queue, steps):
    """The same from the project's own parts, on this rank's share of each batch."""
    wrapped = moco
    if is_distributed():
        wrapped = DistributedDataParallel(moco, broadcast_buffers=False)
    parameters_q, parameters_k = (
        list(encoder.parameters()) for encoder in (moco.encoder_q, moco.encoder_k)
    )
    optimizer = torch.optim.SGD(
        parameters_q, lr=LR, momentum=SGD_MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    share = BATCH // world_size()
    own = slice(rank() * share, (rank() + 1) * share)
    for step in range(steps):
        query_view, key_view = (view[own] for view in views(step))
        loss, _ = queue.contrast(wrapped(query_view, key_view, step), T, None, step)
        loss.backward()
        mean_loss = loss.detach().clone()
        average([mean_loss])
        gradients = [parameter.grad.clone() for parameter in parameters_q]
        optimizer.step()
        optimizer.zero_grad()
        # The paper's update stands at the end of a step, here it is the first thing of the next.
        before = [parameter.clone() for parameter in parameters_k]
        moco.move_key_encoder()
        followed = [parameter.clone() for parameter in parameters_k]
        torch._foreach_copy_(parameters_k, before)
        yield (
            mean_loss.item(),
            gradients,
            torch.roll(queue.rows_KD, -queue.place, dims=0),
            followed,
        )


def way_off(found, expected):
    """The longest difference among tensors, over the length of what is expected."""
    pairs = zip(found, expected, strict=True)
    return max(((a - b).norm() / (b.norm() + 1e-12)).item() for a, b in pairs)


def compare(length, steps=STEPS, is_symmetric=False):
    """For each step how far loss, gradients, queue and f_k are off; and whether ranks are equal.

    The first rank compares with the reference, the others with the first.
    """
    torch.manual_seed(SEED)
    config = MoCoConfig(momentum=M, batch_norm_groups=GROUPS, symmetric=is_symmetric)
    moco = MoCo(ENCODER, config, global_batch=BATCH, seed=SEED).double()
    queue = KeyQueue(length, ENCODER.dim, SEED).double()
    reference = algorithm_1(
        copy.deepcopy(moco.encoder_q), queue.rows_KD.clone(), steps, is_symmetric
    )
    off, are_equal = [], True
    for loss, gradients, queue_KD, keys in ours(moco, queue, steps):
        are_equal = are_equal and all_equal([*gradients, queue_KD, *keys])
        if rank() == 0:
            expected_loss, expected_gradients, expected_KD, expected_keys = next(reference)
            off.append(
                (
                    abs(loss - expected_loss),
                    way_off(gradients, expected_gradients),
                    way_off([queue_KD], [expected_KD]),
                    way_off(keys, expected_keys),
                )
            )
    return off, are_equal


@pytest.mark.parametrize(
    ("world", "length"),
    [
        (1, 32),
        (1, 27),
        (2, 27),
        (4, 32),
        pytest.param(2, 32, marks=pytest.mark.slow),
        pytest.param(4, 27, marks=pytest.mark.slow),
    ],
)
def test_fifty_steps_are_algorithm_1_of_the_paper(world, length):
    found = [compare(length)] if world == 1 else run_in_processes(world, compare, length)
    off = found[0][0]
    assert len(off) == STEPS
    # Rounding grows where it carries a value over the edge of a ReLU.
    for step, (loss, gradients, queue, keys) in enumerate(off):
        assert max(loss, gradients, queue, keys) < (1e-9 if step < 10 else 1e-5), f"step {step}"
    assert all(are_equal for _, are_equal in found)


@pytest.mark.parametrize("world", [1, 2])
def test_a_symmetric_loss_is_the_sum_of_both_ways_against_the_same_queue(world):
    found = [compare(40, 8, True)] if world == 1 else run_in_processes(world, compare, 40, 8, True)
    assert len(found[0][0]) == 8
    assert max(max(off) for off in found[0][0]) < 1e-9
    assert all(are_equal for _, are_equal in found)
