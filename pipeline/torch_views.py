"""Views made by Pillow and torchvision from the parameters of ``view_recipe``: the plain truth.

This is what the official MoCo code does, operation by operation and in its order. It is the
reference that the DALI graph is measured against, and the fallback where DALI has no wheel.

Letters in names: N pictures, H W pixels (always square here).
"""

import io
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import torchvision.transforms.functional as TF
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError
from torch import Tensor

from pipeline.transcode import as_8_bit
from pipeline.validate import FORMATS
from pipeline.view_recipe import BRIGHTNESS, CONTRAST, SATURATION, ViewParameters, ViewRequest

Bytes = NDArray[np.uint8]

# Those whose headers were looked at; others (EPS runs a program) are not even tried.
PILLOW_FORMATS = tuple(name for names in FORMATS.values() for name in names)


class DecodeError(Exception):
    """A picture of a batch cannot be decoded."""


def decode(picture: Bytes) -> Image.Image:
    """The stored picture as RGB; EXIF rotation is ignored, as by torchvision's ``ImageFolder``.

    Raises:
        DecodeError: if it cannot be decoded.
    """
    Image.MAX_IMAGE_PIXELS = None  # the loaders have a limit of their own, which a user may set
    try:
        image: Image.Image = Image.open(io.BytesIO(picture.data), formats=PILLOW_FORMATS)
        if image.mode.startswith("I;16"):  # Pillow would cut at 255 what DALI scales
            image, _ = as_8_bit(image)
        return image.convert("RGB")
    except UnidentifiedImageError:  # its message has an address in memory
        raise DecodeError("not a picture in a known format") from None
    except Exception as error:  # Pillow's decoders raise a dozen kinds for broken input
        raise DecodeError(f"{type(error).__name__}: {error}") from error


def view_picture(
    picture: Image.Image, parameters: ViewParameters, row: int, image_px: int
) -> Image.Image:
    """One view of one decoded picture, as 8-bit RGB before normalisation."""
    x, y, w, h = (int(v) for v in parameters.crop_xywh_px[row])
    view = TF.resized_crop(picture, y, x, h, w, [image_px, image_px])
    grey = bool(parameters.grey[row])
    if grey and parameters.grey_first:
        view = TF.rgb_to_grayscale(view, num_output_channels=3)
    if parameters.jitter[row]:
        for operation in parameters.jitter_order[row]:
            view = _jitter(view, int(operation), float(parameters.factors[row, operation]))
    if grey and not parameters.grey_first:
        view = TF.rgb_to_grayscale(view, num_output_channels=3)
    if parameters.sigma_px[row] > 0:
        view = view.filter(ImageFilter.GaussianBlur(radius=float(parameters.sigma_px[row])))
    if parameters.solarise[row]:
        view = ImageOps.solarize(view)
    return TF.hflip(view) if parameters.flip[row] else view


def _jitter(view: Image.Image, operation: int, factor: float) -> Image.Image:
    if operation == BRIGHTNESS:
        return TF.adjust_brightness(view, factor)
    if operation == CONTRAST:
        return TF.adjust_contrast(view, factor)
    if operation == SATURATION:
        return TF.adjust_saturation(view, factor)
    # A strength of 0 is no operation, as in ColorJitter: by way of 8-bit HSV it would cost levels.
    return TF.adjust_hue(view, factor) if factor else view


def normalise(
    views: Sequence[Image.Image],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Tensor:
    """Views as a ``[N, 3, H, W]`` float32 tensor with the given mean and deviation taken out.

    Args:
        views: 8-bit RGB pictures of one size.
        mean: of each channel, for values in [0, 1].
        std: likewise.
    """
    views_NHW3 = torch.from_numpy(np.stack([np.asarray(view) for view in views]))
    views_N3HW = views_NHW3.permute(0, 3, 1, 2).float().div_(255)
    scale = torch.tensor(std).view(1, 3, 1, 1)
    return views_N3HW.sub_(torch.tensor(mean).view(1, 3, 1, 1)).div_(scale).contiguous()


def make_views(
    request: ViewRequest,
    image_px: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> tuple[Tensor, ...]:
    """A ``[N, 3, H, W]`` float32 tensor for each view; decodes each picture once.

    Raises:
        DecodeError: if a picture cannot be decoded.
    """
    decoded = [decode(picture) for picture in request.pictures]
    return tuple(
        normalise(
            [view_picture(picture, view, row, image_px) for row, picture in enumerate(decoded)],
            mean,
            std,
        )
        for view in request.views
    )


def on_device(view: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A view where it is used; on a CPU and in its own type it is not copied.

    To a GPU it goes through pinned memory, so that the copy runs beside whatever the GPU does and
    this thread does not wait for it: 16-bit views are half as many bytes already on the host.
    """
    view = view.to(dtype)
    if device.type != "cuda":
        return view.to(device)
    return view.pin_memory().to(device, non_blocking=True)


def undecodable_by(
    decoder: Callable[[NDArray[np.uint8]], object], pictures: Sequence[NDArray[np.uint8]]
) -> dict[int, str]:
    """Which of the pictures a decoder refuses, by row, and why."""
    problems = {}
    for row, picture in enumerate(pictures):
        try:
            decoder(picture)
        except DecodeError as error:
            problems[row] = str(error)
    return problems


class TorchEngine:
    """Does what ``dali_views.DaliEngine`` does, with Pillow and torchvision on the CPU.

    Args:
        next_request: gives the next batch; called from ``take``, a few batches ahead.
        image_px: side of the views.
        normalisation: mean and deviation of each channel, for values in [0, 1].
        device: where the views are to lie.
        half: float16 views.
        threads: batches that are in the making at once.
    """

    def __init__(
        self,
        next_request: Callable[[], ViewRequest],
        *,
        image_px: int,
        normalisation: tuple[tuple[float, float, float], tuple[float, float, float]],
        device: torch.device,
        half: bool,
        threads: int,
    ) -> None:
        self._next_request = next_request
        self._image_px = image_px
        self._normalisation = normalisation
        self._device = device
        self._dtype = torch.float16 if half else torch.float32
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="views")
        self._ahead = threads + 1
        self._in_flight: deque[Future[tuple[Tensor, ...]]] = deque()

    def take(self) -> tuple[Tensor, ...]:
        """The views of the oldest request, ``[N, 3, H, W]`` each.

        Raises:
            DecodeError: if a picture of that request cannot be decoded; the next call goes on with
                the request after it.
        """
        while len(self._in_flight) < self._ahead:
            self._in_flight.append(self._pool.submit(self.make, self._next_request()))
        return self._in_flight.popleft().result()

    def make(self, request: ViewRequest) -> tuple[Tensor, ...]:
        """The views of this request alone, outside the stream."""
        views = make_views(request, self._image_px, *self._normalisation)
        return tuple(on_device(view, self._device, self._dtype) for view in views)

    def undecodable(self, pictures: Sequence[Bytes]) -> dict[int, str]:
        """Which of the pictures cannot be decoded, and why."""
        return undecodable_by(decode, pictures)

    def close(self) -> None:
        """Stop making views that nobody will take."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def eval_picture(
    picture: Image.Image, resize_px: int, crop_px: int, interpolation: str
) -> Image.Image:
    """The evaluation view: shorter side to ``resize_px``, then the middle ``crop_px`` square."""
    mode = {"bilinear": TF.InterpolationMode.BILINEAR, "bicubic": TF.InterpolationMode.BICUBIC}
    resized = TF.resize(picture, [resize_px], mode[interpolation])
    return TF.center_crop(resized, [crop_px, crop_px])
