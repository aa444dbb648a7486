"""The pass over the queue on a CPU: each thread reads its own part of it.

PyTorch's own threads meet after every operation, some hundred times for a long queue. Where other
programs share the cores the one that was put aside is waited for each time, which made the loss
slower than the plain form. Here threads meet once, and whoever is free takes the next segment.

Letters in names: N images on this process, D embedding size, K queue length.
"""

import functools
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from model.info_nce import SoftmaxSums, chunked_sums

# A number of its own and not that of the threads: the sums, added up in the order of the segments,
# are the same bits on any number of cores.
SEGMENTS = 16
# Logits of a chunk: 1 MiB of float32, what the cache of a core holds.
CHUNK_LOGITS = 2**18
# A shorter queue is done before the threads have been woken.
MIN_PRODUCTS = 2**24


def threaded_sums(scaled_ND: Tensor, queue_KD: Tensor) -> SoftmaxSums:
    """``chunked_sums`` with the threads that PyTorch may use here, one segment at a time.

    Args:
        scaled_ND: queries over temperature, in units of log 2; float32 or float64.
        queue_KD: of any floating-point type.
    """
    work = functools.partial(chunked_sums, scaled_ND, chunk_logits=CHUNK_LOGITS)
    segments = queue_KD.split(max(1, -(-len(queue_KD) // SEGMENTS)))
    threads = torch.get_num_threads()
    is_small = queue_KD.numel() * len(scaled_ND) < MIN_PRODUCTS
    if threads == 1 or is_small:
        parts = [work(segment) for segment in segments]
    else:
        parts = list(_pool(threads, os.getpid()).map(work, segments))
    return merged(parts)


def merged(parts: list[SoftmaxSums]) -> SoftmaxSums:
    """The sums of several parts of a queue as those of the whole."""
    highest_N1 = torch.stack([part.highest_N1 for part in parts]).amax(dim=0)
    total_N1 = torch.zeros_like(parts[0].total_N1)
    weighted_ND = torch.zeros_like(parts[0].weighted_ND)
    for part in parts:
        rescale_N1 = (part.highest_N1 - highest_N1).exp2_()
        total_N1.addcmul_(part.total_N1, rescale_N1)
        weighted_ND.addcmul_(part.weighted_ND, rescale_N1)
    return SoftmaxSums(highest_N1, total_N1, weighted_ND)


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:  # noqa: ARG001  a fork has none
    """Threads each of which computes alone."""
    all_ready = threading.Barrier(threads)

    def start() -> None:
        # OpenMP's number is the thread's own, PyTorch's the process's: put right below.
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread takes the process's number over at its first use
        torch.set_grad_enabled(False)

    pool = ThreadPoolExecutor(threads, thread_name_prefix="info-nce", initializer=start)
    # None is done with this before all have begun, so that each thread takes one.
    for meeting in [pool.submit(all_ready.wait) for _ in range(threads)]:
        meeting.result()
    torch.set_num_threads(threads)
    return pool
