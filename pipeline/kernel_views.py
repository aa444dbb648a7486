"""The views on a CPU by compiled kernels: bit-equal to torchvision's with Pillow.

JPEGs are decoded by libjpeg-turbo, the decoder that Pillow has too, but straight into an array;
everything else, and every error, is left to Pillow. Threads share the pictures of a batch, and none
of them holds Python's lock while it works.

Letters in names: N pictures, S side of a view.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.blur_kernel import blur, blur_boxes
from pipeline.colour_kernels import GREY, look_up, recolour
from pipeline.picture_header import BadHeaderError, read_header
from pipeline.resize_kernel import PILLOW_REORDERS, resize
from pipeline.torch_views import DecodeError, decode, normalise, on_device, undecodable_by
from pipeline.view_recipe import HUE, ViewParameters, ViewRequest

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Triple = tuple[float, float, float]

# While one batch is consumed the next two are in the making; more only holds memory.
AHEAD_BATCHES = 2
PART_PICTURES = 8  # what a thread takes at a time


@dataclass(frozen=True)
class KernelInputs:
    """What the kernels are told of one view of N samples, in their units."""

    window_N4: NDArray[np.int64]
    mirror_N: NDArray[np.bool_]
    steps_N6: NDArray[np.int8]
    strengths_N6: Floats
    box_N3: NDArray[np.uint32]
    solarise_N: NDArray[np.int64]


def kernel_inputs(view: ViewParameters) -> KernelInputs:
    """The parameters of a view as the kernels want them."""
    order = view.jitter_order
    factors = np.take_along_axis(view.factors, order, axis=1)
    # The sign of a negative turn is lost in a byte, as in torchvision.
    strengths = np.where(order == HUE, np.trunc(factors * 255).astype(np.int64) & 255, factors)
    is_neutral = factors == (order != HUE)
    steps = np.where(view.jitter[:, None] & ~is_neutral, order + 1, 0)
    grey = np.where(view.grey, GREY, 0)[:, None]
    none = np.zeros_like(grey)
    ends = (grey, none) if view.grey_first else (none, grey)
    return KernelInputs(
        np.ascontiguousarray(view.crop_xywh_px, dtype=np.int64),
        view.flip,
        np.hstack([ends[0], steps, ends[1]]).astype(np.int8),
        np.pad(strengths, ((0, 0), (1, 1))).astype(np.float32),
        blur_boxes(view.sigma_px),
        view.solarise.astype(np.int64),
    )


def decoded_rgb(picture: Bytes) -> Bytes:
    """``[H, W, 3]``, bit-equal to ``torch_views.decode``.

    Raises:
        DecodeError: what Pillow says of a picture that it cannot decode.
    """
    try:
        header = read_header(picture)
        # Pillow has its own way from CMYK to RGB.
        if header.format == "jpeg" and header.channels in (1, 3):
            decoded: Bytes = simplejpeg.decode_jpeg(picture, "RGB")
            return decoded
    except (BadHeaderError, ValueError):
        pass  # Pillow may be more lenient, or else says what is wrong
    return np.array(decode(picture))  # a copy that may be written to: the type that is compiled for


def level_tables(mean: Triple, std: Triple) -> Floats:
    """What ``torch_views.normalise`` makes of each level in each channel, and of its solarised one.

    ``[2, 3, 256]``
    """
    levels = np.arange(256, dtype=np.uint8)
    rows = np.stack([levels, np.where(levels < 128, levels, 255 - levels)])
    picture = Image.fromarray(np.repeat(rows[:, :, None], 3, axis=2))
    return normalise([picture], mean, std)[0].permute(1, 0, 2).contiguous().numpy()


class ArrayPool:
    """Memory of batches that nobody uses any longer, for the next ones.

    Fresh memory of this size comes from the kernel page by page, each zeroed first.
    """

    def __init__(self) -> None:
        self._free: list[Floats] = []
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...]) -> Floats:
        """An array with any content; its memory is free again when it and its views are gone."""
        with self._lock:
            fitting = [n for n, array in enumerate(self._free) if array.shape == shape]
            # torch's memory starts at multiples of 64 bytes, which NumPy's need not.
            array = self._free.pop(fitting[-1]) if fitting else torch.empty(shape).numpy()
        lent = array[:]
        weakref.finalize(lent, self._free.append, array)
        return lent


class KernelEngine:
    """Does what ``dali_views.DaliEngine`` does, on a CPU and bit-equal to ``TorchEngine``.

    Args:
        next_request: gives the next batch; called from ``take``, ``AHEAD_BATCHES`` ahead.
        image_px: side of the views.
        normalisation: mean and deviation of each channel, for values in [0, 1].
        device: where the views are to lie.
        half: float16 views.
        threads: that decode and compute.
    """

    def __init__(
        self,
        next_request: Callable[[], ViewRequest],
        *,
        image_px: int,
        normalisation: tuple[Triple, Triple],
        device: torch.device,
        half: bool,
        threads: int,
    ) -> None:
        self._next_request = next_request
        self._side = image_px
        self._tables = level_tables(*normalisation)
        self._device = device
        self._dtype = torch.float16 if half else torch.float32
        self._arrays = ArrayPool()
        self._in_flight: deque[_Batch] = deque()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="views")
        compile_kernels(self._tables)

    def take(self) -> tuple[Tensor, ...]:
        """The views of the oldest request, ``[N, 3, S, S]`` each.

        Raises:
            DecodeError: if a picture of that request cannot be decoded; the next call goes on with
                the request after it.
        """
        while len(self._in_flight) <= AHEAD_BATCHES:
            self._in_flight.append(self._start(self._next_request()))
        return self._finish(self._in_flight.popleft())

    def make(self, request: ViewRequest) -> tuple[Tensor, ...]:
        """The views of this request alone, outside the stream."""
        return self._finish(self._start(request))

    def _start(self, request: ViewRequest) -> "_Batch":
        count = len(request.pictures)
        shape = (count, 3, self._side, self._side)
        inputs = [kernel_inputs(view) for view in request.views]
        outputs = [self._arrays.take(shape) for _ in inputs]
        parts = [
            self._pool.submit(
                make_part, request.pictures, inputs, outputs, self._tables, range(first, last)
            )
            for first in range(0, count, PART_PICTURES)
            for last in [min(first + PART_PICTURES, count)]
        ]
        return _Batch(parts, outputs)

    def _finish(self, batch: "_Batch") -> tuple[Tensor, ...]:
        errors = [part.exception() for part in batch.parts]  # none of them runs on
        for error in errors:
            if error is not None:
                raise error
        return tuple(
            on_device(torch.from_numpy(output), self._device, self._dtype)
            for output in batch.outputs
        )

    def undecodable(self, pictures: Sequence[Bytes]) -> dict[int, str]:
        """Which of the pictures cannot be decoded, and why."""
        return undecodable_by(decoded_rgb, pictures)

    def close(self) -> None:
        """Stop making views that nobody will take."""
        self._pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class _Batch:
    """A batch in the making."""

    parts: list[Future[None]]
    outputs: list[Floats]


def make_part(
    pictures: Sequence[Bytes],
    inputs: Sequence[KernelInputs],
    outputs: Sequence[Floats],
    tables: Floats,
    rows: range,
) -> None:
    """Fill some rows of the outputs, one for each view; each picture is decoded once.

    Raises:
        DecodeError: if a picture cannot be decoded, or is smaller than its windows say.
    """
    for row in rows:
        picture = decoded_rgb(pictures[row])
        for view, output in zip(inputs, outputs, strict=True):
            fill_row(picture, view, row, tables, output[row])


def fill_row(picture: Bytes, view: KernelInputs, row: int, tables: Floats, out_3SS: Floats) -> None:
    """One view of one decoded picture.

    Raises:
        DecodeError: if the picture is smaller than the window says: compiled code does not look.
    """
    x, y, w, h = view.window_N4[row].tolist()
    height, width, _ = picture.shape
    if x + w > width or y + h > height:
        raise DecodeError(f"{width}x{height} pixels, a window ends at {x + w}x{y + h}")
    lines = picture.reshape(height, 3 * width)
    view_S3S = np.empty((out_3SS.shape[1], 3, out_3SS.shape[2]), np.uint8)
    resize(lines, view.window_N4[row], bool(view.mirror_N[row]), PILLOW_REORDERS, view_S3S)
    recolour(view_S3S, view.steps_N6[row], view.strengths_N6[row])
    if view.box_N3[row, 1] > 0:
        blur(view_S3S, view.box_N3[row])
    look_up(view_S3S, tables[view.solarise_N[row]], out_3SS)


def compile_kernels(tables: Floats) -> None:
    """Compile, or load from the cache, before the first batch: all threads would wait for it."""
    one = np.ones(1, np.int64)
    view = ViewParameters(
        crop_xywh_px=np.array([[0, 0, 1, 1]]),
        flip=one < 0,
        jitter=one < 0,
        jitter_order=np.arange(4)[None],
        factors=np.ones((1, 4)),
        grey=one < 0,
        sigma_px=np.ones(1),
        solarise=one < 0,
        grey_first=False,
    )
    out = np.empty((3, 1, 1), np.float32)
    fill_row(np.zeros((1, 1, 3), np.uint8), kernel_inputs(view), 0, tables, out)
