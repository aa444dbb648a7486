"""Split batch norm against a plain one for each group."""

import copy

import pytest
import torch
from torch import nn

from model.batch_norm import CpuSyncBatchNorm, SplitBatchNorm, split_batch_norms, sync_batch_norms
from model.collectives import rank, world_size
from model.encoder import Encoder, EncoderConfig
from tests.run_in_processes import run_in_processes

CHANNELS = 5


def trained(norm):
    """A norm whose weights and statistics are not those of a new one."""
    generator = torch.Generator().manual_seed(0)
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        tensor.copy_(torch.rand(CHANNELS, generator=generator) + 0.5)
    return norm


def plain_like(norm):
    plain = nn.BatchNorm2d(CHANNELS)
    plain.load_state_dict(norm.state_dict())
    return plain


def pictures(count, seed):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.5, 3, count).view(count, 1, 1, 1)
    return scale * torch.randn(count, CHANNELS, 3, 4, generator=generator) + scale


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_outputs_and_gradients_are_those_of_a_batch_norm_for_each_group(groups):
    split, x = trained(SplitBatchNorm(CHANNELS, groups)), pictures(12, seed=1)
    separate = [plain_like(split) for _ in range(groups)]
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    own, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = split(own)
    parts = other.chunk(groups)
    expected = torch.cat([norm(part) for norm, part in zip(separate, parts, strict=True)])
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-5)
    for name in ("weight", "bias"):
        summed = sum(getattr(norm, name).grad for norm in separate)
        torch.testing.assert_close(getattr(split, name).grad, summed, rtol=1e-4, atol=1e-4)


def test_running_statistics_are_the_mean_of_the_groups_own():
    split = trained(SplitBatchNorm(CHANNELS, 3))
    separate = [plain_like(split) for _ in range(3)]
    for step in range(4):
        x = pictures(12, seed=step)
        split(x)
        for norm, part in zip(separate, x.chunk(3), strict=True):
            norm(part)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(norm, name) for norm in separate]).mean(dim=0)
        torch.testing.assert_close(getattr(split, name), mean)
    assert split.num_batches_tracked == 4


def test_evaluation_is_plain_and_changes_nothing():
    split = trained(SplitBatchNorm(CHANNELS, 4)).eval()
    before = copy.deepcopy(split.state_dict())
    x = pictures(7, seed=3)
    torch.testing.assert_close(split(x), plain_like(split).eval()(x), rtol=0, atol=0)
    torch.testing.assert_close(split.state_dict(), before, rtol=0, atol=0)


def test_a_batch_that_the_groups_do_not_divide_is_named():
    with pytest.raises(ValueError, match="a batch of 10 cannot be split into 4 equal groups"):
        SplitBatchNorm(CHANNELS, 4)(pictures(10, seed=0))


def test_state_dict_names_are_those_of_a_plain_batch_norm():
    split, plain = SplitBatchNorm(CHANNELS, 2), nn.BatchNorm2d(CHANNELS)
    assert list(split.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(split.state_dict())


def test_replacing_keeps_the_weights_and_leaves_no_plain_batch_norm():
    network = nn.Sequential(nn.Sequential(trained(nn.BatchNorm2d(CHANNELS))), nn.ReLU())
    before = copy.deepcopy(network.state_dict())
    split_batch_norms(network, 4)
    assert network[0][0].groups == 4
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


# Each of them is accepted or refused; what must not be is a network that keeps one group.
@pytest.mark.parametrize(
    "backbone",
    ["resnet18", "resnet18d", "seresnet18", "resnext50_32x4d", "resnetv2_18", "skresnet18"],
)
def test_an_encoder_with_groups_has_no_batch_norm_over_the_whole_batch(backbone):
    try:
        with torch.device("meta"):
            encoder = Encoder(EncoderConfig(backbone=backbone), batch_norm_groups=4)
    except ValueError as error:
        assert backbone in str(error)
        return
    norms = [m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert {getattr(norm, "groups", 1) for norm in norms} == {4}


def test_a_split_norm_of_rows_without_scale_is_one_for_each_group():
    rows = torch.randn(12, CHANNELS) * 3 + 1
    expected = torch.cat([nn.BatchNorm1d(CHANNELS, affine=False)(part) for part in rows.chunk(3)])
    torch.testing.assert_close(SplitBatchNorm(CHANNELS, 3, affine=False)(rows), expected)


def rows_or_pictures(is_flat):
    x = pictures(12, seed=4).double()
    return x.mean(dim=(2, 3)) if is_flat else x


def sync_step(is_flat):
    """Output, gradients and statistics of two steps of this rank's share."""
    norm = trained(CpuSyncBatchNorm(CHANNELS)).double()
    x = rows_or_pictures(is_flat)
    share = len(x) // world_size()
    own = x[rank() * share : (rank() + 1) * share].clone().requires_grad_()
    norm(own * 2)
    out = norm(own)
    (out * out.detach().cos()).sum().backward()
    return out.detach(), own.grad, norm.weight.grad, norm.bias.grad, norm.state_dict()


@pytest.mark.parametrize("is_flat", [True, False])
@pytest.mark.parametrize("world", [2, 3])
def test_a_synced_norm_of_several_processes_is_a_plain_one_over_all_their_pictures(world, is_flat):
    plain = plain_like(trained(CpuSyncBatchNorm(CHANNELS)))
    plain = nn.BatchNorm1d(CHANNELS) if is_flat else plain
    plain.load_state_dict(trained(CpuSyncBatchNorm(CHANNELS)).state_dict())
    x = rows_or_pictures(is_flat).requires_grad_()
    plain = plain.double()
    plain(x * 2)
    out = plain(x)
    (out * out.detach().cos()).sum().backward()
    ranks = run_in_processes(world, sync_step, is_flat)
    torch.testing.assert_close(torch.cat([found[0] for found in ranks]), out.detach())
    torch.testing.assert_close(torch.cat([found[1] for found in ranks]), x.grad)
    torch.testing.assert_close(sum(found[2] for found in ranks), plain.weight.grad)
    torch.testing.assert_close(sum(found[3] for found in ranks), plain.bias.grad)
    for found in ranks:
        torch.testing.assert_close(dict(found[4]), dict(plain.state_dict()))


def half_sync_step():
    """Output and statistics for pictures in bfloat16, as autocast gives them."""
    norm = trained(CpuSyncBatchNorm(CHANNELS))
    own = pictures(12, seed=4).bfloat16().chunk(world_size())[rank()].requires_grad_()
    out = norm(own)
    out.sum().backward()
    return out.detach(), own.grad, norm.state_dict()


def test_a_synced_norm_takes_activations_of_half_precision_and_sums_in_float32():
    plain, x = plain_like(trained(CpuSyncBatchNorm(CHANNELS))), pictures(12, seed=4).bfloat16()
    expected = plain(x.float())
    ranks = run_in_processes(2, half_sync_step)
    out = torch.cat([found[0] for found in ranks])
    torch.testing.assert_close(out, expected.bfloat16(), rtol=1e-2, atol=1e-2)
    for _, gradient, statistics in ranks:
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(dict(statistics), dict(plain.state_dict()))


def test_a_synced_norm_alone_and_in_evaluation_is_plain():
    norm, x = trained(CpuSyncBatchNorm(CHANNELS)), pictures(6, seed=5)
    torch.testing.assert_close(norm(x), plain_like(trained(CpuSyncBatchNorm(CHANNELS)))(x))
    torch.testing.assert_close(norm.eval()(x), plain_like(norm).eval()(x))


def test_syncing_leaves_no_plain_norm_and_keeps_the_weights():
    network = Encoder(EncoderConfig(backbone="test_resnet", head="v3", hidden=8, dim=4))
    before = copy.deepcopy(network.state_dict())
    sync_batch_norms(network)
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert {type(norm) for norm in norms} == {nn.SyncBatchNorm}
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
