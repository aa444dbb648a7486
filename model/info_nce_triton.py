"""The sums of the loss on CUDA: one kernel reads the queue once and keeps no logits.

A program holds a tile of queries and goes through one part of the queue with a running maximum, as
fused attention does. There are as many parts as fill the GPU, not one: 256 queries alone would be
8 programs. Their partial sums, a few megabytes whatever K is, are put together by PyTorch.

Letters in names: N queries, D embedding size, K queue length, S parts of the queue.
"""

from typing import Any

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from model.info_nce import SoftmaxSums

# The largest tiles whose state stays in registers on sm_80 and sm_90 (ptxas reports no spills);
# 64 x 64 keeps half a kilobyte to 14 KB of it in local memory.
QUERIES, ROWS, WARPS = 32, 32, 8
MAX_DIM = 256
PROGRAMS_PER_MULTIPROCESSOR = 2
CPU_MULTIPROCESSORS = 4  # of Triton's interpreter, in tests


@triton.jit  # type: ignore[untyped-decorator]
def sums_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913 (a kernel has no objects)
    query_ptr,
    queue_ptr,
    highest_ptr,
    total_ptr,
    weighted_ptr,
    n,
    d,
    k,
    rows_per_part,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Highest logit, sum and weighted sum of one tile of queries over one part of the queue."""
    query_ids = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    part = tl.program_id(1)
    columns = tl.arange(0, DIM)
    is_query = query_ids < n
    query_places = query_ids[:, None] * d + columns[None, :]
    is_element = is_query[:, None] & (columns[None, :] < d)
    query = tl.load(query_ptr + query_places, mask=is_element, other=0.0)

    highest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    weighted = tl.zeros([QUERIES, DIM], tl.float32)
    first = part * rows_per_part
    last = tl.minimum(first + rows_per_part, k)
    for start in range(first, last, ROWS):
        row_ids = start + tl.arange(0, ROWS)
        is_row = row_ids < last
        rows = tl.load(
            queue_ptr + row_ids[:, None].to(tl.int64) * d + columns[None, :],
            mask=is_row[:, None] & (columns[None, :] < d),
            other=0.0,
        ).to(tl.float32)
        logits = tl.dot(query, tl.trans(rows), input_precision=PRECISION)
        logits = tl.where(is_row[None, :], logits, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(logits, 1))
        weights = tl.exp2(logits - new_highest[:, None])
        rescale = tl.exp2(highest - new_highest)
        total = total * rescale + tl.sum(weights, 1)
        weighted = weighted * rescale[:, None]
        weighted += tl.dot(weights, rows, input_precision=PRECISION)
        highest = new_highest

    tl.store(highest_ptr + part * n + query_ids, highest, mask=is_query)
    tl.store(total_ptr + part * n + query_ids, total, mask=is_query)
    part_start = part.to(tl.int64) * n * d
    tl.store(weighted_ptr + part_start + query_places, weighted, mask=is_element)


def triton_sums(scaled_ND: Tensor, queue_KD: Tensor) -> SoftmaxSums:
    """What ``model.info_nce.chunked_sums`` gives; float64 queries are taken to float32.

    Args:
        scaled_ND: queries over temperature, in units of log 2.
        queue_KD: float32, bfloat16 or float16.
    """
    query_ND, queue_KD = scaled_ND.float().contiguous(), queue_KD.contiguous()
    (n, d), k = query_ND.shape, len(queue_KD)
    tiles = triton.cdiv(n, QUERIES)
    wanted_parts = max(1, PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(query_ND.device) // tiles)
    rows_per_part = ROWS * triton.cdiv(triton.cdiv(k, ROWS), wanted_parts)
    parts = triton.cdiv(k, rows_per_part)  # none of them is empty
    highest_SN1 = query_ND.new_empty(parts, n, 1)
    total_SN1 = query_ND.new_empty(parts, n, 1)
    weighted_SND = query_ND.new_empty(parts, n, d)
    sums_kernel[(tiles, parts)](
        query_ND,
        queue_KD,
        highest_SN1,
        total_SN1,
        weighted_SND,
        n,
        d,
        k,
        rows_per_part,
        **kernel_options(d, query_ND.device),
    )
    highest_N1 = highest_SN1.amax(dim=0)
    rescale_SN1 = (highest_SN1 - highest_N1).exp2_()
    return SoftmaxSums(
        highest_N1,
        (total_SN1 * rescale_SN1).sum(dim=0),
        weighted_SND.mul_(rescale_SN1).sum(dim=0),
    )


def kernel_options(dim: int, device: torch.device) -> dict[str, Any]:
    """Tiles and precision.

    tf32 alone would round similarities to three decimal places. Three products of tf32 parts have
    float32's precision on the tensor cores; above 128 dimensions they do not fit the registers.
    """
    has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    is_small = dim <= 128 and torch.version.hip is None
    return {
        "QUERIES": QUERIES,
        "ROWS": ROWS,
        "DIM": max(16, triton.next_power_of_2(dim)),
        "PRECISION": "tf32x3" if has_tf32 and is_small else "ieee",
        "num_warps": WARPS,
        "num_stages": 2,
        "enable_fp_fusion": True,
    }


def multiprocessors(device: torch.device) -> int:
    """How many programs run at once, at one each."""
    if device.type != "cuda":
        return CPU_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
