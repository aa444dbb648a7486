"""A batch in micro-batches against the same one at once: nothing that is learnt differs."""

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from model.collectives import is_distributed, rank, world_size
from model.encoder import EncoderConfig
from model.mechanism import ENCODERS, loss_scale, make_dictionary
from model.micro_batches import MicroBatches
from model.moco import MoCoConfig, count_micro_batches
from tests.run_in_processes import run_in_processes

BATCH, SAMPLES, DIM, STEPS = 16, 40, 16, 3
V3 = {"mechanism": "batch", "symmetric": True, "predictor": True, "loss_2t": True}
FORMS = {
    "v1": {"batch_norm": "shuffle"},
    "v2, symmetric": {"batch_norm": "split", "symmetric": True},
    "v3": {"batch_norm": "shuffle", **V3},
    "v3, fixed statistics": {"batch_norm": "none", **V3},
    "memory bank": {"mechanism": "memory-bank", "symmetric": True},
}


def pieces(form, micro_batch):
    """Encoders, wrapped encoders and dictionary of a form, in float64; gradients are counted."""
    torch.manual_seed(0)
    config = MoCoConfig(**{"queue": 24, "momentum": 0.9, "batch_norm_groups": 4, **FORMS[form]})
    head = "v3" if config.predictor else "mlp"
    encoder = EncoderConfig(backbone="test_resnet", dim=DIM, head=head, hidden=32)
    encoders = ENCODERS[config.mechanism](encoder, config, BATCH, 0, 32, micro_batch).double()
    encoders.train("fixed" not in form)
    dictionary = make_dictionary(config, DIM, SAMPLES, seed=0).double()
    wrapped, exchanged = encoders, []
    if is_distributed():
        wrapped = DistributedDataParallel(encoders, broadcast_buffers=False)

        def count(state, bucket):
            exchanged.append(bucket.index())
            return allreduce_hook(state, bucket)

        wrapped.register_comm_hook(None, count)
    passes = MicroBatches(wrapped, encoders, dictionary, config.temperature, loss_scale(config))
    return encoders, dictionary, passes, exchanged


def trained(form, micro_batch):
    """All that this rank has after some steps, the last step's gradients too."""
    encoders, dictionary, passes, exchanged = pieces(form, micro_batch)
    optimizer = torch.optim.SGD(encoders.trained_parameters(), lr=0.05, momentum=0.9)
    share = BATCH // world_size()
    own = slice(rank() * share, (rank() + 1) * share)
    seen, told = [], []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        views = torch.randn(2, BATCH, 3, 32, 32, generator=generator, dtype=torch.float64)
        sample_B = torch.randperm(SAMPLES, generator=generator)[:BATCH]
        optimizer.zero_grad()
        found = passes.run(views[:, own], sample_B[own].numpy(), step, seen.append)
        dictionary.settle()
        told.append(torch.stack(found))
        optimizer.step()
    assert len(seen) == STEPS
    seen = [pair for pairs in seen for pair in pairs]
    assert not any(tensor.requires_grad for pair in seen for tensor in pair)
    return {
        "loss, accuracy": told,
        "looked at": seen,
        "encoders": dict(encoders.state_dict()),
        "gradients": [p.grad for p in encoders.trained_parameters()],
        "dictionary": dict(dictionary.state_dict()),
        "exchanges": len(exchanged),
    }


@pytest.mark.parametrize("form", FORMS)
def test_micro_batches_of_one_process_learn_what_the_batch_at_once_does(form):
    whole = trained(form, None)
    for size, count in ((8, 2), (4, 4)):
        assert pieces(form, size)[0].micro_batches == count
        torch.testing.assert_close(trained(form, size), whole, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_micro_batches_of_two_processes_do_too_and_exchange_gradients_once(form):
    whole = run_in_processes(2, trained, form, None)
    parts = run_in_processes(2, trained, form, 4)
    assert whole[0]["exchanges"] > 0
    torch.testing.assert_close(parts, whole, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "batch", "world", "most", "count"),
    [
        ({}, 256, 1, None, 1),
        ({}, 256, 1, 256, 1),
        ({}, 256, 1, 255, 2),  # the greatest size that fits, 128
        ({}, 256, 1, 64, 4),
        ({}, 256, 1, 32, 8),  # as few pictures as on each of the paper's 8 GPUs
        ({}, 256, 2, 64, 2),
        ({}, 256, 8, 64, 1),  # the share is 32
        ({"batch_norm": "sync"}, 4096, 8, 100, 8),
        ({"batch_norm": "none", "mechanism": "memory-bank"}, 30, 1, 6, 5),
        ({"mechanism": "end-to-end"}, 256, 1, 256, 1),
    ],
)
def test_a_share_is_cut_into_as_few_micro_batches_as_fit(settings, batch, world, most, count):
    assert count_micro_batches(MoCoConfig(**settings), batch, world, most) == count


@pytest.mark.parametrize(
    ("settings", "world", "most", "message"),
    [
        ({}, 1, 31, "whole batch-norm groups of 32: give 32, 64, 128 or 256, or more --moco.batch"),
        ({}, 4, 20, "the 64 pictures .* whole batch-norm groups of 32: give 32 or 64, or more"),
        ({}, 8, 16, "whole batch-norm groups of 32: give 32, or more"),
        ({"batch_norm": "none"}, 8, 1, "the 32 pictures .* parts: give 2, 4, 8, 16 or 32$"),
        ({"mechanism": "end-to-end"}, 1, 64, "all keys of a step at once, the 256 pictures"),
    ],
)
def test_a_micro_batch_that_cannot_be_is_refused_with_those_that_can(
    settings, world, most, message
):
    with pytest.raises(ValueError, match=f"--micro-batch {most}: .*{message}"):
        count_micro_batches(MoCoConfig(**settings), 256, world, most)
