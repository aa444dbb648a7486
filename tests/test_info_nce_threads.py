"""The loss's pass over the queue on several threads; the truth is the softmax in float64."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from model.info_nce_threads import SEGMENTS, threaded_sums
from tests.test_info_nce import unit_rows


@pytest.fixture
def threads():
    """``threads(n)`` gives PyTorch n threads for the length of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_queue_is_too_small(monkeypatch):
    monkeypatch.setattr("model.info_nce_threads.MIN_PRODUCTS", 0)


def case(n, d, k):
    return 20 * unit_rows(n, d, seed=1), unit_rows(k, d, seed=3)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 1000, 5000])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_sums_are_those_of_a_softmax(length, count, threads):
    threads(count)
    scaled_ND, queue_KD = case(6, 16, length)
    sums = threaded_sums(scaled_ND, queue_KD)
    logits_NK = scaled_ND.double() @ queue_KD.double().T
    weights_NK = (logits_NK - sums.highest_N1.double()).exp2()
    torch.testing.assert_close(sums.highest_N1.double(), logits_NK.amax(1, True), rtol=0, atol=1e-5)
    torch.testing.assert_close(sums.total_N1.double(), weights_NK.sum(1, True), rtol=1e-5, atol=0)
    exact_ND = weights_NK @ queue_KD.double()
    torch.testing.assert_close(sums.weighted_ND.double(), exact_ND, rtol=1e-4, atol=1e-4)


def test_the_number_of_threads_changes_no_bit(threads):
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(threaded_sums(*case(8, 32, 3001)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_the_work_is_shared_and_pytorch_keeps_its_threads(threads, monkeypatch):
    seen = Counter()
    plain = threaded_sums.__globals__["chunked_sums"]

    def watched(*args, **kwargs):
        seen[threading.current_thread()] += 1
        assert torch.get_num_threads() == 1 and not torch.is_grad_enabled()
        return plain(*args, **kwargs)

    threads(4)  # as no other test, so that the pool begins here
    threaded_sums(*case(2, 4, 40))
    monkeypatch.setattr("model.info_nce_threads.chunked_sums", watched)
    for _ in range(20):
        threaded_sums(*case(64, 64, 4096))
    assert 1 < len(seen) <= 4 and all(thread.name.startswith("info-nce") for thread in seen)
    assert seen.total() == 20 * SEGMENTS
    # Of this thread, and what one that begins now takes over.
    assert torch.get_num_threads() == 4
    with ThreadPoolExecutor(1) as another:
        assert another.submit(torch.get_num_threads).result() == 4


def test_a_short_queue_wakes_no_thread(threads, monkeypatch):
    monkeypatch.undo()
    seen, plain = set(), threaded_sums.__globals__["chunked_sums"]

    def watched(*args, **kwargs):
        seen.add(threading.current_thread())
        return plain(*args, **kwargs)

    monkeypatch.setattr("model.info_nce_threads.chunked_sums", watched)
    threads(3)
    threaded_sums(*case(8, 32, 3001))
    assert seen == {threading.current_thread()}


def test_an_error_in_a_thread_reaches_the_caller(threads):
    threads(2)
    with pytest.raises(RuntimeError):
        threaded_sums(unit_rows(2, 4, seed=1), unit_rows(32, 5, seed=2))
