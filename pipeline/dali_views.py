"""The DALI graph that decodes each picture once and makes its views, on a CPU or a GPU.

DALI draws no random number and reads no file: bytes and the numbers of ``view_recipe`` come from
the host through one external source. Costly operations run only for the samples that drew them
(DALI's conditionals). The window is cut by the resize itself, which also mirrors it when start and
end are swapped.

The region is given to the resize and not to the decoder: nvImageCodec 0.9, which DALI 2.4 needs,
crashes when it decodes regions on an H100 (its issue 55), and one decode serves both views.

Letters in names: N pictures, H W pixels.
"""

from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from pipeline.colour_map import colour_maps
from pipeline.torch_views import DecodeError
from pipeline.view_recipe import ViewParameters, ViewRecipe, ViewRequest

Bytes = NDArray[np.uint8]
Triple = tuple[float, float, float]

# A second and third batch are decoded while one is consumed; more only holds memory.
PREFETCH_BATCHES = 2

# DALI passes on the numbers of nvImageCodec's nvimgcodecStatus_t (nvimgcodec.h); what the decoder
# itself said goes to the process's standard error only.
DECODER_SIGNS = (
    ("Failed to decode sample", "its data are damaged or break off"),
    ("failure: '#3'", "its structure is damaged"),
    ("failure: '#4'", "a format that DALI does not decode"),
    ("failure: '#13'", "its structure is damaged"),
    ("failure: '#14'", "a format that DALI does not decode"),
    ("failure: '#17'", "its structure is damaged or breaks off"),
    ("Invalid sample_type: 0", "a kind of its format that DALI does not decode"),
)


def fields_of(recipe: ViewRecipe) -> list[str]:
    """The names of the inputs that the graph of this recipe has, in their order."""
    fields = ["roi_start", "roi_end"]
    if recipe.jitter_probability or recipe.grey_probability:
        fields += ["recolours", "own", "mean"]
    if recipe.blur_probability:
        fields += ["blurs", "sigma"]
    if recipe.solarise_probability:
        fields += ["solarises"]
    return fields


def view_inputs(view: ViewParameters) -> dict[str, NDArray[Any]]:
    """Every input of one view by its name, in DALI's units and layout."""
    x, y, w, h = view.crop_xywh_px.astype(np.float32).T
    left, right = np.where(view.flip, x + w, x), np.where(view.flip, x, x + w)
    recolours, own, mean = colour_maps(view)
    return {
        "roi_start": np.stack([y, left], axis=1),
        "roi_end": np.stack([y + h, right], axis=1),
        "recolours": recolours,
        "own": own,
        "mean": mean,
        "blurs": view.sigma_px > 0,
        "sigma": view.sigma_px.astype(np.float32),
        "solarises": view.solarise,
    }


def graph_inputs(
    pictures: Sequence[Bytes], recipes: Sequence[ViewRecipe], views: Sequence[ViewParameters]
) -> list[Any]:
    """What the graph's external source returns for one batch."""
    inputs: list[Any] = [list(pictures)]
    for recipe, view in zip(recipes, views, strict=True):
        by_name = view_inputs(view)
        inputs += [by_name[field] for field in fields_of(recipe)]
    return inputs


def decode(encoded: Any, device: str) -> Any:
    """RGB pictures with torchvision's decoding: smooth chroma, EXIF rotation ignored."""
    return fn.decoders.image(
        encoded,
        device="mixed" if device == "gpu" else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
    )


def normalised(view: Any, mean: Triple, std: Triple, device: str, *, half: bool) -> Any:
    """Mean and deviation taken out; channels last on a GPU, first on a CPU, as each prefers."""
    return fn.crop_mirror_normalize(
        view,
        mean=[255 * v for v in mean],
        std=[255 * v for v in std],
        dtype=types.FLOAT16 if half else types.FLOAT,
        output_layout="HWC" if device == "gpu" else "CHW",
    )


def view_graph(pictures: Any, given: dict[str, Any], image_px: int) -> Any:
    """One view of decoded pictures as 8-bit HWC: crop, flip, colour, blur, solarise.

    Args:
        pictures: 8-bit RGB, HWC, of any sizes.
        given: the inputs of this view by name; an operation whose inputs are absent is left out.
        image_px: side of the view.
    """
    view = fn.resize(
        pictures,
        roi_start=given["roi_start"],
        roi_end=given["roi_end"],
        resize_x=image_px,
        resize_y=image_px,
        interp_type=types.INTERP_LINEAR,
        antialias=True,
    )
    # The outer condition shapes the graph, the inner one picks samples when it runs.
    if "recolours" in given:  # noqa: SIM102
        if given["recolours"]:
            # A named argument must lie on the CPU, so the mean colour of a picture on the GPU
            # enters by arithmetic and not as the operator's offset.
            mean = fn.reductions.mean(view, axes=(0, 1), keep_dims=True)
            offset = fn.coord_transform(mean, M=given["mean"])
            own = fn.coord_transform(view, M=given["own"], dtype=types.FLOAT)
            view = fn.cast_like(own + offset, view)
    if "blurs" in given:  # noqa: SIM102
        if given["blurs"]:
            view = fn.gaussian_blur(view, sigma=given["sigma"])
    if "solarises" in given:  # noqa: SIM102
        if given["solarises"]:
            bright = view >= 128
            view = fn.cast_like(bright * (255 - view) + (bright == False) * view, view)  # noqa: E712
    return view


@pipeline_def(enable_conditionals=True)
def pair_graph(
    source: Callable[[], list[Any]],
    recipes: Sequence[ViewRecipe],
    image_px: int,
    normalisation: tuple[Triple, Triple],
    device: Literal["cpu", "gpu"],
    half: bool,
) -> tuple[Any, ...]:
    """One output for each recipe, ``[N, 3, H, W]`` on a CPU, ``[N, H, W, 3]`` on a GPU."""
    encoded, *given = fn.external_source(
        source=source, num_outputs=1 + len(inputs_of(recipes)), batch=True, no_copy=True
    )
    pictures = decode(encoded, device)
    return views_of(pictures, given, recipes, image_px, normalisation, device, half=half)


@pipeline_def(enable_conditionals=True)
def decoded_graph(
    source: Callable[[], list[Any]],
    decoded_source: Callable[[], list[Any]],
    recipes: Sequence[ViewRecipe],
    image_px: int,
    normalisation: tuple[Triple, Triple],
    device: Literal["cpu", "gpu"],
    half: bool,
) -> tuple[Any, ...]:
    """``pair_graph`` without its decoding, to see what the rest costs.

    The second source gives decoded pictures, 8-bit HWC, where ``device`` is.
    """
    given = fn.external_source(
        source=source, num_outputs=len(inputs_of(recipes)), batch=True, no_copy=True
    )
    pictures = fn.external_source(
        source=decoded_source, batch=True, no_copy=True, layout="HWC", device=device
    )
    return views_of(pictures, given, recipes, image_px, normalisation, device, half=half)


def inputs_of(recipes: Sequence[ViewRecipe]) -> list[tuple[int, str]]:
    """View and name of every input that the recipes have together, in their order."""
    return [(number, f) for number, recipe in enumerate(recipes) for f in fields_of(recipe)]


def views_of(
    pictures: Any,
    given: Sequence[Any],
    recipes: Sequence[ViewRecipe],
    image_px: int,
    normalisation: tuple[Triple, Triple],
    device: Literal["cpu", "gpu"],
    *,
    half: bool,
) -> tuple[Any, ...]:
    """The views of decoded pictures, one output for each recipe."""
    names = inputs_of(recipes)
    views = []
    for number in range(len(recipes)):
        own_given = {field: given[k] for k, (view, field) in enumerate(names) if view == number}
        view = view_graph(pictures, own_given, image_px)
        views.append(normalised(view, *normalisation, device, half=half))
    return tuple(views)


@pipeline_def
def eval_graph(
    source: Callable[[], list[Any]],
    crop_px: int,
    interpolation: Literal["bilinear", "bicubic"],
    normalisation: tuple[Triple, Triple],
    device: Literal["cpu", "gpu"],
) -> Any:
    """The middle square of ``crop_px`` of resized pictures, normalised.

    The source gives the pictures, their sizes after the resize (height, width) and the upper left
    corner of the crop (y, x): torchvision's roundings, which are not DALI's, happen on the host.
    """
    encoded, size, corner = fn.external_source(
        source=source, num_outputs=3, batch=True, no_copy=True
    )
    resized = fn.resize(
        decode(encoded, device),
        size=size,
        interp_type=types.INTERP_CUBIC if interpolation == "bicubic" else types.INTERP_LINEAR,
        antialias=True,
    )
    cropped = fn.slice(resized, start=corner, shape=[crop_px, crop_px], axes=(0, 1))
    return normalised(cropped, *normalisation, device, half=False)


def eval_inputs(
    pictures: Sequence[Bytes], size_px_N2: NDArray[np.int64], resize_px: int, crop_px: int
) -> list[Any]:
    """What ``eval_graph`` is given for a batch.

    Args:
        pictures: encoded.
        size_px_N2: width and height of each.
        resize_px: the shorter side after the resize.
        crop_px: side of the crop.
    """
    shorter = size_px_N2.min(axis=1, keepdims=True)
    # As torchvision: the longer side is cut to a whole number, the corner rounded half to even.
    resized_N2 = resize_px * size_px_N2 // shorter
    corner_N2 = np.rint((resized_N2 - crop_px) / 2)
    return [
        list(pictures),
        np.ascontiguousarray(resized_N2[:, ::-1]).astype(np.float32),
        np.ascontiguousarray(corner_N2[:, ::-1]).astype(np.int32),
    ]


@pipeline_def
def decode_graph(source: Callable[[], list[Any]], device: Literal["cpu", "gpu"]) -> Any:
    """Only decodes: which picture of a failed batch is the bad one."""
    (encoded,) = fn.external_source(source=source, num_outputs=1, batch=True, no_copy=True)
    return decode(encoded, device)


def to_torch(output: Any) -> Tensor:
    """A dense DALI output as a ``[N, 3, H, W]`` tensor that shares its memory."""
    views: Tensor = torch.from_dlpack(output.as_tensor())  # type: ignore[attr-defined]
    is_channels_last = views.shape[-1] == 3
    return views.permute(0, 3, 1, 2) if is_channels_last else views


def run(pipeline: Any, device: torch.device) -> tuple[Tensor, ...]:
    """The next outputs of a pipeline, ``[N, 3, H, W]`` each.

    On a GPU they are bound to torch's current stream: ready for what it does next, and their
    memory is used again only after what it has done with them.
    """
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    return tuple(to_torch(output) for output in pipeline.run(stream))


def pipeline_arguments(
    batch: int, threads: int, device: torch.device, prefetch: int = PREFETCH_BATCHES
) -> dict[str, Any]:
    """Arguments of DALI's own that every graph here takes.

    The default executor is left in place: with it a picture that cannot be decoded costs its own
    batch, with the older one the pipeline (measured; ``tests/test_loader.py`` watches it).
    """
    return {
        "batch_size": batch,
        "num_threads": threads,
        "device_id": (device.index or 0) if device.type == "cuda" else None,
        "prefetch_queue_depth": prefetch,
    }


class DaliEngine:
    """Makes the views of one request after another, a few batches ahead of its consumer.

    Args:
        next_request: gives the next batch; called from ``take``, ``PREFETCH_BATCHES`` ahead.
        recipes: one for each view.
        batch: pictures in every request.
        image_px: side of the views.
        normalisation: mean and deviation of each channel, for values in [0, 1].
        device: where pictures are decoded and views made.
        half: float16 views.
        threads: of the CPU, for decoding.
    """

    def __init__(  # noqa: PLR0913 (keywords, each named at the call)
        self,
        next_request: Callable[[], ViewRequest],
        recipes: Sequence[ViewRecipe],
        *,
        batch: int,
        image_px: int,
        normalisation: tuple[Triple, Triple],
        device: torch.device,
        half: bool,
        threads: int,
    ) -> None:
        self._next_request = next_request
        self._recipes = recipes
        self._device = device
        self._threads = threads
        # Inputs are not copied, so they must live until their batch has left the pipeline.
        self._in_flight: deque[list[Any]] = deque()
        self._graph_arguments = {
            "recipes": recipes,
            "image_px": image_px,
            "normalisation": normalisation,
            "device": "gpu" if device.type == "cuda" else "cpu",
            "half": half,
        }
        self._batch = batch
        self._pipeline = pair_graph(
            source=self._feed,
            **self._graph_arguments,
            **pipeline_arguments(batch, threads, device),
        )
        self._pipeline.build()

    def _feed(self) -> list[Any]:
        request = self._next_request()
        inputs = graph_inputs(request.pictures, self._recipes, request.views)
        self._in_flight.append(inputs)
        return inputs

    def take(self) -> tuple[Tensor, ...]:
        """The views of the oldest request, ``[N, 3, H, W]`` each.

        Raises:
            DecodeError: if a picture of that request cannot be decoded; the next call goes on with
                the request after it.
        """
        try:
            outputs = run(self._pipeline, self._device)
        except RuntimeError as error:
            if not is_decode_error(error):
                raise
            self._in_flight.popleft()
            raise DecodeError(str(error)) from error
        self._in_flight.popleft()
        return outputs

    def make(self, request: ViewRequest) -> tuple[Tensor, ...]:
        """The views of this request alone, outside the stream: a failed batch run again."""
        inputs = graph_inputs(request.pictures, self._recipes, request.views)
        pipeline = pair_graph(
            source=lambda: inputs,
            **self._graph_arguments,
            **pipeline_arguments(self._batch, self._threads, self._device, prefetch=1),
        )
        pipeline.build()
        return run(pipeline, self._device)

    def undecodable(self, pictures: Sequence[Bytes]) -> dict[int, str]:
        """Which of the pictures cannot be decoded, and why; each is tried alone."""
        return undecodable(pictures, self._device)

    def close(self) -> None:
        """Let go of the pipeline and with it of its threads and memory."""
        self._pipeline = None


def is_decode_error(error: RuntimeError) -> bool:
    """Whether a run failed because of a picture, so that the pipeline goes on with the next."""
    return "nvImageCodec" in str(error) or "decoders" in str(error)


def undecodable(pictures: Sequence[Bytes], device: torch.device) -> dict[int, str]:
    """Which of the pictures cannot be decoded, and why; each is tried alone."""
    problems = ((row, _problem_with(picture, device)) for row, picture in enumerate(pictures))
    return {row: problem for row, problem in problems if problem}


def _problem_with(picture: Bytes, device: torch.device) -> str:
    inputs = [[picture]]
    pipeline = decode_graph(
        source=lambda: inputs,
        device="gpu" if device.type == "cuda" else "cpu",
        **pipeline_arguments(1, 1, device, prefetch=1),
    )
    pipeline.build()
    try:
        pipeline.run()
    except RuntimeError as error:
        return first_reason(str(error))
    return ""


def first_reason(message: str) -> str:
    """What DALI's long report says went wrong, in words where it has a number only."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    after = [line for before, line in pairwise(lines) if before.startswith("encountered")]
    reason = (after or lines or ["no reason given"])[0]
    words = next((words for sign, words in DECODER_SIGNS if sign in reason), "")
    return f"{words} (DALI: {reason})" if words else reason
