"""Gaussian blur of a view ``[S, 3, S]``, bit-equal to Pillow's.

Pillow's Gaussian is a box filter with a soft rim, done three times along the rows and three times
along the columns, in 24-bit fractions and with 8-bit results of each pass.

Source: Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering",
SSVM 2011.

Letters in names: N samples, S side of the view.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.compiled import compiled

Bytes = NDArray[np.uint8]
PASSES = 3


def blur_boxes(sigma_px: NDArray[np.float64]) -> NDArray[np.uint32]:
    """Radius of the box for each Gaussian, weight of a byte inside and of one at the rim, [N, 3].

    The weights are 24-bit fractions; all three are 0 where sigma is. In single precision where
    Pillow's is. Equations 7, 11 and 14 of the source.
    """
    one, two, three, six = (np.float32(n) for n in (1, 2, 3, 6))
    sigma = sigma_px.astype(np.float32)
    variance = sigma * sigma / np.float32(PASSES)
    length = np.sqrt(12.0 * variance.astype(np.float64) + 1.0).astype(np.float32)
    whole = np.floor((length.astype(np.float64) - 1.0) / 2.0).astype(np.float32)
    part = (two * whole + one) * (whole * (whole + one) - three * variance)
    radius = whole + part / (six * (variance - (whole + one) * (whole + one)))
    inner = (np.float32(1 << 24) / (radius * two + one)).astype(np.int64)
    rim = ((1 << 24) - (radius.astype(np.int64) * 2 + 1) * inner) // 2
    boxes = np.stack([radius.astype(np.int64), inner, rim], axis=1)
    return np.where(sigma[:, None] > 0, boxes, 0).astype(np.uint32)


@compiled
def box_blur(
    source: Bytes, begin: int, stride: int, box: NDArray[np.uint32], sums: Any, out: Bytes
) -> None:
    """Each byte of ``out`` becomes the mean of those within a radius, ``stride`` apart.

    Args:
        source: flat; what lies ``radius + 1`` strides behind ``begin`` is the middle of the first.
        begin: the first rim.
        stride: distance of neighbours.
        box: a row of ``blur_boxes``.
        sums: at least as many uint32 as ``out`` has bytes, overwritten.
        out: flat.
    """
    count = len(out)
    radius, inner, rim = np.int64(box[0]), box[1], box[2]
    for i in range(count):
        sums[i] = 0
    for k in range(1, 2 * radius + 2):
        part = source[begin + k * stride : begin + k * stride + count]
        for i in range(count):
            sums[i] += part[i]
    end = begin + 2 * (radius + 1) * stride
    low, high = source[begin : begin + count], source[end : end + count]
    for i in range(count):
        edges = np.uint32(low[i]) + np.uint32(high[i])
        out[i] = (sums[i] * inner + edges * rim + np.uint32(1 << 23)) >> np.uint32(24)


@compiled
def blur(view: Bytes, box: NDArray[np.uint32]) -> None:
    """Pillow's Gaussian: three box filters along the rows, then three along the columns."""
    side, margin = view.shape[0], np.int64(box[0]) + 1
    width = 3 * side
    sums = np.empty(width, np.uint32)
    line = np.empty(side + 2 * margin, np.uint8)
    for row in range(side):
        for channel in range(3):
            values = view[row, channel]
            for _ in range(PASSES):
                for i in range(margin):
                    line[i] = values[0]
                    line[margin + side + i] = values[side - 1]
                for i in range(side):
                    line[margin + i] = values[i]
                box_blur(line, 0, 1, box, sums, values)
    rows = view.reshape(side, width)
    padded = np.empty((side + 2 * margin, width), np.uint8)
    for _ in range(PASSES):
        for row in range(side + 2 * margin):
            nearest, copy = rows[min(max(row - margin, 0), side - 1)], padded[row]
            for i in range(width):
                copy[i] = nearest[i]
        for row in range(side):
            box_blur(padded.reshape(-1), row * width, width, box, sums, rows[row])
