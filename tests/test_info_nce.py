"""The fused loss; its plain form, which is the truth for it, is ``plain_loss``."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F

from model.info_nce import (
    _form_for,
    chunked_sums,
    info_nce,
    info_nce_with_accuracy,
    pretext_accuracy,
)
from model.info_nce_threads import threaded_sums

SHAPES = [(1, 2, 1), (3, 8, 5), (4, 16, 64), (7, 5, 33), (16, 128, 100)]


@pytest.fixture
def set_chunk_rows(monkeypatch):
    """``set_chunk_rows(m)`` makes every chunk m rows long."""

    def set_rows(rows):
        monkeypatch.setattr("model.info_nce_threads.CHUNK_LOGITS", 0)
        monkeypatch.setattr("model.info_nce.MIN_CHUNK_ROWS", rows)

    return set_rows


def plain_loss(query_ND, key_ND, queue_KD, temperature):
    """Equation 1 as the official code has it: positive and negatives in one row of logits."""
    positive_N1 = (query_ND * key_ND).sum(dim=1, keepdim=True)
    logits_NC = torch.cat([positive_N1, query_ND @ queue_KD.T], dim=1) / temperature
    return F.cross_entropy(logits_NC, torch.zeros(len(query_ND), dtype=torch.long))


def loss_in_loops(query_ND, key_ND, queue_KD, temperature):
    """Equation 1 as the paper writes it, number by number."""
    losses = []
    for query, key in zip(query_ND.tolist(), key_ND.tolist(), strict=True):
        candidates = [key, *queue_KD.tolist()]
        logits = [
            sum(q * c for q, c in zip(query, candidate, strict=True)) / temperature
            for candidate in candidates
        ]
        losses.append(math.log(sum(math.exp(logit) for logit in logits)) - logits[0])
    return sum(losses) / len(losses)


def unit_rows(rows, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator), dim=1)


def triple(n, d, k):
    """Queries, keys that are near them, and a queue."""
    query_ND = unit_rows(n, d, seed=1)
    key_ND = F.normalize(query_ND + unit_rows(n, d, seed=2), dim=1)
    return query_ND, key_ND, unit_rows(k, d, seed=3)


def with_gradient(loss_of, tensors, temperature):
    """Loss, and its gradient for the queries."""
    query_ND = tensors[0].clone().requires_grad_()
    loss = loss_of(query_ND, *tensors[1:], temperature)
    loss.backward()
    return loss.detach(), query_ND.grad


@pytest.mark.parametrize("temperature", [0.005, 0.01, 0.07, 0.2, 1.0, 10.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("chunk_rows", [1, 7, 8192])
def test_loss_and_gradient_equal_the_plain_form(shape, temperature, chunk_rows, set_chunk_rows):
    set_chunk_rows(chunk_rows)
    tensors = triple(*shape)
    loss, grad_ND = with_gradient(info_nce, tensors, temperature)
    exact, exact_grad_ND = with_gradient(plain_loss, [t.double() for t in tensors], temperature)
    # A similarity is off by 1e-7 or so, which the temperature stretches.
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5, abs=1e-6 / temperature)
    rounding = {"rtol": 1e-4, "atol": 1e-6 / temperature}
    torch.testing.assert_close(grad_ND.double(), exact_grad_ND, **rounding)


@pytest.mark.parametrize("temperature", [0.005, 0.2, 10.0])
@pytest.mark.parametrize("scale", [0.01, 30.0])
def test_vectors_of_any_length_neither_over_nor_underflow(scale, temperature, set_chunk_rows):
    set_chunk_rows(7)
    query_ND, key_ND, queue_KD = triple(16, 32, 100)
    growing_K1 = torch.linspace(0.1, scale, 100)[:, None]  # the highest logit comes late
    tensors = scale * query_ND, key_ND, growing_K1 * queue_KD
    loss, grad_ND = with_gradient(info_nce, tensors, temperature)
    exact, exact_grad_ND = with_gradient(plain_loss, [t.double() for t in tensors], temperature)
    largest = max(1.0, scale**2) / temperature  # logit; its rounding is what remains
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5, abs=1e-6 * largest)
    rounding = 1e-6 * largest * float(exact_grad_ND.abs().max())
    torch.testing.assert_close(grad_ND.double(), exact_grad_ND, rtol=1e-4, atol=rounding)


def test_a_queue_far_below_the_positive_leaves_a_gradient_in_the_right_direction():
    """Weights of 2^-300 are zero in float32, in the plain form too; the loss stays finite."""
    query_ND = torch.tensor([[1.0, 0.0]])
    loss, grad_ND = with_gradient(info_nce, (query_ND, query_ND, -query_ND), 0.005)
    assert loss.item() == 0.0
    assert torch.equal(grad_ND, torch.zeros(1, 2))


def test_float64_is_computed_in_float64():
    tensors = [tensor.double() for tensor in triple(5, 16, 300)]
    loss, grad_ND = with_gradient(info_nce, tensors, 0.07)
    exact, exact_grad_ND = with_gradient(plain_loss, tensors, 0.07)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-13)
    torch.testing.assert_close(grad_ND, exact_grad_ND, rtol=1e-11, atol=1e-14)


def test_a_bfloat16_queue_is_read_exactly():
    query_ND, key_ND, queue_KD = triple(8, 32, 500)
    rounded_KD = queue_KD.bfloat16()
    same = with_gradient(info_nce, (query_ND, key_ND, rounded_KD.float()), 0.07)
    torch.testing.assert_close(
        with_gradient(info_nce, (query_ND, key_ND, rounded_KD), 0.07), same, rtol=0, atol=0
    )


def test_half_precision_queries_get_a_gradient_of_their_own_type():
    query_ND, key_ND, queue_KD = triple(8, 32, 500)
    loss, grad_ND = with_gradient(info_nce, (query_ND.bfloat16(), key_ND, queue_KD), 0.2)
    assert (loss.dtype, grad_ND.dtype) == (torch.float32, torch.bfloat16)


def test_a_number_that_is_none_makes_the_loss_none():
    query_ND, key_ND, queue_KD = triple(4, 8, 16)
    queue_KD[9, 2] = torch.nan
    assert info_nce(query_ND, key_ND, queue_KD, 0.2).isnan()


def test_the_largest_tensor_of_a_pass_does_not_grow_with_the_queue():
    """2^20 logits of a chunk and not N x K, whatever K is."""
    sizes = []
    for length in (40_000, 80_000):
        query_ND, _, queue_KD = triple(64, 8, length)
        with torch.profiler.profile(profile_memory=True) as profile:
            chunked_sums(query_ND, queue_KD)
        allocated = [event.self_cpu_memory_usage for event in profile.events()]
        sizes.append(max(allocated))
    assert sizes[0] == sizes[1] <= 4 * 2**20


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_loss_is_equation_1_number_by_number(temperature):
    tensors = triple(3, 8, 5)
    by_hand = pytest.approx(loss_in_loops(*tensors, temperature), rel=1e-5, abs=1e-6 / temperature)
    assert info_nce(*tensors, temperature).item() == by_hand
    assert plain_loss(*tensors, temperature).item() == by_hand


@pytest.mark.parametrize("similarity", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_equal_similarities_give_the_log_of_the_number_of_candidates(similarity, temperature):
    query_ND = torch.tensor([[1.0, 0.0]] * 4)
    other_2 = torch.tensor([similarity, math.sqrt(1 - similarity**2)])
    tensors = (query_ND, other_2.expand(4, 2), other_2.expand(99, 2))
    loss, grad_ND = with_gradient(info_nce, tensors, temperature)
    assert loss.item() == pytest.approx(math.log(100), rel=1e-6)
    assert grad_ND.abs().max() < 1e-4


@pytest.mark.parametrize(("positive", "loss"), [(1.0, 0.0), (-1.0, 200 + math.log(50))])
def test_extreme_similarities_at_a_low_temperature_neither_overflow_nor_vanish(positive, loss):
    query_ND = torch.tensor([[1.0, 0.0]] * 3)
    tensors = (query_ND, positive * query_ND, -positive * query_ND[:1].expand(50, 2))
    found, grad_ND = with_gradient(info_nce, tensors, temperature=0.01)
    assert found.item() == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert torch.isfinite(grad_ND).all()


def test_keys_and_queue_get_no_gradient():
    query_ND, key_ND, queue_KD = (tensor.requires_grad_() for tensor in triple(4, 8, 16))
    info_nce(query_ND, key_ND, queue_KD, 0.2).backward()
    assert query_ND.grad is not None
    assert key_ND.grad is None
    assert queue_KD.grad is None


def test_the_queue_may_be_overwritten_before_the_backward_pass():
    tensors = triple(4, 8, 16)
    _, expected_ND = with_gradient(info_nce, tensors, 0.2)
    query_ND = tensors[0].clone().requires_grad_()
    loss = info_nce(query_ND, *tensors[1:], 0.2)
    for kept in tensors[1:]:
        kept.fill_(torch.nan)
    loss.backward()
    torch.testing.assert_close(query_ND.grad, expected_ND, rtol=0, atol=0)


def test_what_is_kept_for_the_backward_pass_is_no_larger_than_the_queries():
    query_ND, key_ND, queue_KD = triple(4, 8, 1000)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda t: t):
        info_nce(query_ND.requires_grad_(), key_ND, queue_KD, 0.2)
    assert kept == [query_ND.numel()]


def test_the_gradient_follows_a_scaled_loss():
    tensors = triple(4, 8, 16)
    _, grad_ND = with_gradient(info_nce, tensors, 0.2)
    _, scaled_ND = with_gradient(lambda *all_: 1024 * info_nce(*all_), tensors, 0.2)
    torch.testing.assert_close(scaled_ND, 1024 * grad_ND)


def test_autocast_does_not_lower_the_precision():
    tensors = triple(4, 64, 100)
    expected = info_nce(*tensors, 0.07)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(info_nce(*tensors, 0.07), expected)
        assert info_nce(*tensors, 0.07).dtype == torch.float32


@pytest.mark.parametrize("shapes", [((9, 4), (8, 4), (5, 4)), ((9, 4), (9, 4), (5, 3))], ids=str)
def test_shapes_that_do_not_fit_are_named(shapes):
    numbers = (
        r"\(9, 4\), keys \(\d, 4\) and queue \(5, \d\) must be \(N, D\), \(N, D\) and \(K, D\)"
    )
    with pytest.raises(ValueError, match=numbers):
        info_nce(*(torch.ones(shape) for shape in shapes), 0.2)


@pytest.mark.parametrize("chunk_rows", [1, 7, 8192])
def test_pretext_accuracy_equals_a_count_by_hand(chunk_rows, set_chunk_rows):
    set_chunk_rows(chunk_rows)
    query_ND, queue_KD = unit_rows(40, 3, seed=4), unit_rows(9, 3, seed=5)
    key_ND = F.normalize(query_ND + unit_rows(40, 3, seed=6), dim=1)
    right = sum(
        all(float(query @ key) > float(query @ negative) for negative in queue_KD)
        for query, key in zip(query_ND, key_ND, strict=True)
    )
    assert 0 < right < 40
    assert pretext_accuracy(query_ND, key_ND, queue_KD).item() == pytest.approx(right / 40)
    for temperature in (0.005, 0.2, 10.0):
        trained_ND = query_ND.clone().requires_grad_()
        loss, accuracy = info_nce_with_accuracy(trained_ND, key_ND, queue_KD, temperature)
        assert accuracy.item() == pytest.approx(right / 40) and not accuracy.requires_grad
        assert torch.equal(loss, info_nce(query_ND, key_ND, queue_KD, temperature))


def test_a_key_that_is_in_the_queue_too_does_not_count_as_found():
    corners_44 = torch.eye(4)
    assert pretext_accuracy(corners_44, corners_44, corners_44[:3]) == 0.25


def test_each_device_has_its_form(monkeypatch):
    assert _form_for(torch.device("cpu"), 128) is threaded_sums
    assert _form_for(torch.device("meta"), 128) is chunked_sums
    monkeypatch.setitem(sys.modules, "model.info_nce_triton", None)  # as without Triton
    with pytest.warns(UserWarning, match="in PyTorch's own operations, since Triton does not work"):
        assert _form_for.__wrapped__(torch.device("cuda", 0), 128) is chunked_sums
