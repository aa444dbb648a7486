"""The two encoders and the step between them; two processes against one."""

import copy

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from model.collectives import all_equal, average, is_distributed, rank, world_size
from model.encoder import EncoderConfig
from model.info_nce import info_nce
from model.key_queue import KeyQueue
from model.moco import MoCo, MoCoConfig, groups_per_process
from tests.run_in_processes import run_in_processes

TINY = EncoderConfig(backbone="test_resnet", dim=16)
BATCH = 16


def small_moco(**settings):
    torch.manual_seed(0)
    config = MoCoConfig(**{"batch_norm_groups": 4, "momentum": 0.9, **settings})
    return MoCo(TINY, config, global_batch=BATCH, seed=0)


def views(step, side_px=32):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(2, BATCH, 3, side_px, side_px, generator=generator)


def test_the_key_encoder_starts_as_a_copy_of_the_query_encoder():
    moco = small_moco()
    torch.testing.assert_close(
        moco.encoder_k.state_dict(), moco.encoder_q.state_dict(), rtol=0, atol=0
    )
    shared = {t.data_ptr() for t in moco.encoder_q.state_dict().values()}
    assert not shared & {t.data_ptr() for t in moco.encoder_k.state_dict().values()}


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.999, 1.0])
def test_every_key_parameter_moves_by_equation_2(momentum):
    moco = small_moco(momentum=momentum)
    for parameter in moco.encoder_q.parameters():
        parameter.data.add_(torch.randn(parameter.shape))
    before = copy.deepcopy(dict(moco.encoder_k.named_parameters()))
    moco.move_key_encoder()
    query = dict(moco.encoder_q.named_parameters())
    for name, moved in moco.encoder_k.named_parameters():
        expected = momentum * before[name] + (1 - momentum) * query[name]
        torch.testing.assert_close(moved.data, expected.data, msg=name)


def test_the_buffers_of_the_key_encoder_are_its_own():
    moco = small_moco()
    moco.encoder_q(views(0)[0])
    before = copy.deepcopy(dict(moco.encoder_k.named_buffers()))
    moco.move_key_encoder()
    torch.testing.assert_close(dict(moco.encoder_k.named_buffers()), before, rtol=0, atol=0)


def test_the_key_encoder_moves_before_it_makes_the_keys():
    moco = small_moco(momentum=0.5, batch_norm="none")
    for parameter in moco.encoder_q.parameters():
        parameter.data.mul_(1.5)
    followed = copy.deepcopy(moco)
    followed.move_key_encoder()
    ((_, key_ND),) = moco(*views(0), step=0)
    torch.testing.assert_close(key_ND, followed.encoder_k(views(0)[1]))


def test_only_the_query_encoder_gets_a_gradient():
    moco = small_moco()
    ((query_ND, key_ND),) = moco(*views(0), step=0)
    info_nce(query_ND, key_ND, KeyQueue(8, 16, 0).rows_KD, 0.2).backward()
    assert not key_ND.requires_grad
    assert all(parameter.grad is not None for parameter in moco.encoder_q.parameters())
    for parameter in moco.encoder_k.parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad


def groups_seen(moco, step):
    """The picture numbers in each batch-norm group of both encoders at one step."""
    seen = {}
    for name in ("encoder_q", "encoder_k"):
        encoder = getattr(moco, name)
        encoder.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.update({name: inputs[0][:, 0, 0, 0].tolist()})
        )
    numbered = torch.arange(float(BATCH)).view(BATCH, 1, 1, 1).expand(BATCH, 3, 32, 32)
    moco(numbered, numbered.clone(), step=step)
    size = BATCH // 4
    return {
        name: [frozenset(rows[i : i + size]) for i in range(0, BATCH, size)]
        for name, rows in seen.items()
    }


def test_keys_take_their_statistics_from_other_pictures_than_their_queries():
    moco = small_moco()
    for step in range(3):
        groups = groups_seen(moco, step)
        assert not set(groups["encoder_q"]) & set(groups["encoder_k"])
        assert frozenset().union(*groups["encoder_k"]) == set(range(BATCH))


def test_keys_come_back_in_the_order_of_their_queries():
    moco = small_moco().eval()  # without batch statistics a key does not depend on its group
    ((_, key_ND),) = moco(*views(0), step=3)
    torch.testing.assert_close(key_ND, moco.encoder_k(views(0)[1]))


def test_without_batch_norm_groups_the_keys_are_not_shuffled():
    groups = groups_seen(small_moco(batch_norm="none"), step=0)
    assert groups["encoder_q"] == groups["encoder_k"]


def test_split_has_the_groups_of_shuffle_in_one_process():
    moco = small_moco(batch_norm="split")
    groups = groups_seen(moco, step=0)
    assert not set(groups["encoder_q"]) & set(groups["encoder_k"])
    assert frozenset().union(*groups["encoder_k"]) == set(range(BATCH))
    with pytest.raises(ValueError, match="split needs several groups in each process, 8 groups"):
        groups_per_process(MoCoConfig(batch_norm="split"), 256, 8)


def test_synced_keys_are_not_shuffled_and_share_one_group():
    moco = small_moco(batch_norm="sync")
    norms = [m for m in moco.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert {type(norm) for norm in norms} == {torch.nn.SyncBatchNorm}
    groups = groups_seen(moco, step=0)
    assert groups["encoder_q"] == groups["encoder_k"]
    assert groups_per_process(MoCoConfig(batch_norm="sync"), 256, 4) == 1


@pytest.mark.parametrize(
    ("groups", "batch", "world", "expected"),
    [
        (8, 256, 1, 8),  # the paper's 8 GPUs on one
        (8, 256, 2, 4),
        (8, 256, 8, 1),
        (8, 1024, 64, 1),  # more processes than groups: each is one
        (8, 512, 1, 8),
        (1, 7, 1, 1),
    ],
)
def test_the_groups_of_the_global_batch_are_shared_out(groups, batch, world, expected):
    config = MoCoConfig(batch_norm_groups=groups)
    assert groups_per_process(config, batch, world) == expected
    assert groups_per_process(MoCoConfig(batch_norm="none"), batch, world) == 1


@pytest.mark.parametrize(
    ("groups", "batch", "world"),
    [(8, 258, 1), (8, 240, 3), (8, 8, 1), (6, 256, 4)],
)
def test_groups_that_do_not_share_out_are_named_with_the_flag(groups, batch, world):
    message = (
        f"{groups} batch-norm groups do not share out a global batch of {batch} over {world} "
        ".*--moco.batch-norm-groups"
    )
    with pytest.raises(ValueError, match=message):
        groups_per_process(MoCoConfig(batch_norm_groups=groups), batch, world)


@pytest.mark.parametrize("settings", [{"batch_norm": "none"}, {"batch_norm_groups": 4}], ids=str)
def test_a_process_with_one_picture_has_no_statistics_and_is_refused(settings):
    with pytest.raises(ValueError, match="a global batch of 8 over 8 processes"):
        groups_per_process(MoCoConfig(**settings), 8, 8)


@pytest.mark.parametrize(
    ("name", "value"),
    [("queue", 0), ("momentum", 1.1), ("momentum", -0.1), ("temperature", 0.0),
     ("bank_momentum", 1.0), ("bank_momentum", -0.1), ("batch_norm_groups", 0)],
)  # fmt: skip
def test_a_number_out_of_range_is_named_with_its_flag(name, value):
    flag = "--moco." + name.replace("_", "-")
    with pytest.raises(ValueError, match=f"{flag} {value}: give a number"):
        MoCoConfig(**{name: value})


def test_numbers_at_the_end_of_their_range_are_taken():
    MoCoConfig(queue=1, momentum=0.0, bank_momentum=0.0, batch_norm_groups=1)
    MoCoConfig(momentum=1.0)


def train(steps):
    """Losses, parameters and queue after some steps on this rank's part of the global batches."""
    moco = small_moco()
    is_parallel = is_distributed()
    wrapped = DistributedDataParallel(moco, broadcast_buffers=False) if is_parallel else moco
    queue = KeyQueue(24, 16, seed=0)
    optimizer = torch.optim.SGD(moco.encoder_q.parameters(), lr=0.01, momentum=0.9)
    share = BATCH // world_size()
    own = slice(rank() * share, (rank() + 1) * share)
    losses = []
    for step in range(steps):
        query_view, key_view = views(step, side_px=64)
        ((query_ND, key_ND),) = wrapped(query_view[own], key_view[own], step)
        loss = info_nce(query_ND, key_ND, queue.rows_KD, 0.2)
        queue.push(key_ND)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        average([mean])
        losses.append(mean.item())
    parameters = dict(moco.named_parameters())
    is_same = all_equal([*parameters.values(), queue.rows_KD])
    average(buffer for buffer in moco.buffers() if buffer.is_floating_point())
    named = {name: tensor.detach() for name, tensor in moco.state_dict().items()}
    return losses, named, queue.rows_KD, queue.place, is_same


def test_two_processes_take_the_first_step_as_one_with_the_same_global_batch():
    losses, named, rows_KD, place, _ = train(1)
    for found in run_in_processes(2, train, 1):
        torch.testing.assert_close(found[0], losses, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1], named, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found[2], rows_KD, rtol=1e-4, atol=1e-5)
        assert found[3] == place


def test_two_processes_train_as_one_with_the_same_global_batches():
    losses, named, rows_KD, place, _ = train(5)
    start = small_moco().state_dict()
    for found in run_in_processes(2, train, 5):
        torch.testing.assert_close(found[0], losses, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found[2], rows_KD, rtol=0, atol=0.02)
        assert found[3] == place
        assert found[4], "parameters or queues differ between the ranks"
        for encoder in ("encoder_q", "encoder_k"):
            # Rounding grows from step to step, where it carries a value over the edge of a ReLU.
            way = flat(named, encoder) - flat(start, encoder)
            off_course = flat(found[1], encoder) - flat(named, encoder)
            assert off_course.norm() < 0.05 * way.norm()


def flat(named, encoder):
    chosen = [tensor.flatten() for name, tensor in named.items() if name.startswith(encoder)]
    return torch.cat([tensor.double() for tensor in chosen])
