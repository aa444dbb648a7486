"""The augmentation recipes, and the numbers that they give for one view of one sample.

Parameters are drawn on the host from a hash of (seed, epoch, sample, view), all samples of a batch
at once. The same arrays drive DALI on a GPU, DALI on a CPU and torchvision, so the three can be
compared pixel by pixel, and a resumed or rerun step sees the same views.

Letters in names: N samples.
"""

from dataclasses import dataclass
from itertools import permutations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.integer_hash import UInts, hash_of, uniform

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop

# The draws of a view, each its own stream of the hash. Numbers are part of every run's identity.
DRAW_AREA, DRAW_ASPECT, DRAW_X, DRAW_Y = 0, 100, 200, 300  # one for each attempt
DRAW_FLIP, DRAW_JITTER, DRAW_ORDER, DRAW_GREY, DRAW_BLUR, DRAW_SIGMA, DRAW_SOLARISE = range(
    400, 407
)
DRAW_FACTORS = 410  # four of them

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # torchvision's numbering in ColorJitter
JITTER_ORDERS = np.array(list(permutations(range(4))))


@dataclass(frozen=True, kw_only=True)
class ViewRecipe:
    """What may happen to a picture on its way to one view, in the order of the fields.

    Strengths follow torchvision's ``ColorJitter``: a factor from ``[1 - s, 1 + s]``, for hue a
    turn from ``[-s, s]`` of the colour circle.
    """

    crop_area: tuple[float, float]  # share of the picture's area
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    grey_first: bool = False  # MoCo v1 turns grey before the jitter, all others after it
    jitter_probability: float = 0.0
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # brightness ... hue
    grey_probability: float = 0.0
    blur_probability: float = 0.0
    blur_sigma_px: tuple[float, float] = (0.1, 2.0)
    solarise_probability: float = 0.0
    flip_probability: float = 0.5


PairName = Literal["moco-v1", "moco-v2", "moco-v3", "moco-v3-vit", "cifar10", "marks"]

_V2 = ViewRecipe(
    crop_area=(0.2, 1.0),
    jitter_probability=0.8,
    jitter=(0.4, 0.4, 0.4, 0.1),
    grey_probability=0.2,
    blur_probability=0.5,
)
_V1 = ViewRecipe(
    crop_area=(0.2, 1.0),
    grey_first=True,
    grey_probability=0.2,
    jitter_probability=1.0,
    jitter=(0.4, 0.4, 0.4, 0.4),
)
_V3 = {
    "crop_area": (0.2, 1.0),
    "jitter_probability": 0.8,
    "jitter": (0.4, 0.4, 0.2, 0.1),
    "grey_probability": 0.2,
}
_V3_VIT = _V3 | {"crop_area": (0.08, 1.0)}  # the official default; ResNets: --crop-min=.2
_CIFAR = ViewRecipe(
    crop_area=(0.08, 1.0),
    jitter_probability=0.8,
    jitter=(0.4, 0.4, 0.4, 0.1),
    grey_probability=0.2,
)
# Written marks (digits, letters): a mirror image is another mark, and colour says nothing.
_MARKS = ViewRecipe(
    crop_area=(0.4, 1.0),
    crop_aspect=(3 / 5, 5 / 3),
    jitter_probability=0.8,
    jitter=(0.4, 0.4, 0.0, 0.0),
    blur_probability=0.3,
    blur_sigma_px=(0.1, 1.0),
    flip_probability=0.0,
)

# Query and key recipe of each name. Sources: v1 section 3.3 of https://arxiv.org/abs/1911.05722
# and main_moco.py without --aug-plus; v2 https://arxiv.org/abs/2003.04297 and --aug-plus;
# v3 https://arxiv.org/abs/2104.02057 and its main_moco.py; cifar10 the authors' CIFAR-10 notebook.
PAIRS: dict[PairName, tuple[ViewRecipe, ViewRecipe]] = {
    "moco-v1": (_V1, _V1),
    "moco-v2": (_V2, _V2),
    "moco-v3": (
        ViewRecipe(**_V3, blur_probability=1.0),  # type: ignore[arg-type]
        ViewRecipe(**_V3, blur_probability=0.1, solarise_probability=0.2),  # type: ignore[arg-type]
    ),
    "moco-v3-vit": (
        ViewRecipe(**_V3_VIT, blur_probability=1.0),  # type: ignore[arg-type]
        ViewRecipe(**_V3_VIT, blur_probability=0.1, solarise_probability=0.2),  # type: ignore[arg-type]
    ),
    "cifar10": (_CIFAR, _CIFAR),
    "marks": (_MARKS, _MARKS),
}


@dataclass(frozen=True)
class ViewParameters:
    """The numbers of one view for N samples.

    ``crop_xywh_px`` ``[N, 4]`` int64 in pixels of the stored picture; ``factors`` ``[N, 4]`` in the
    units of torchvision (brightness, contrast, saturation, hue as a share of the circle), neutral
    where ``jitter`` is False; ``jitter_order`` ``[N, 4]``, the operations in the order in which
    they are done; ``sigma_px`` ``[N]``, 0 where there is no blur; the others ``[N]`` bool.
    """

    crop_xywh_px: Ints
    flip: Bools
    jitter: Bools
    jitter_order: Ints
    factors: Floats
    grey: Bools
    sigma_px: Floats
    solarise: Bools
    grey_first: bool

    def take(self, rows: Ints) -> "ViewParameters":
        """The parameters of some of the samples."""
        arrays = {k: v[rows] for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        return ViewParameters(**arrays, grey_first=self.grey_first)


def draw_view(
    recipe: ViewRecipe, size_px_N2: Ints, keys: tuple[int, int, int], sample_N: Ints
) -> ViewParameters:
    """Draw one view of N samples.

    Args:
        recipe: what may happen and how strongly.
        size_px_N2: width and height of each stored picture.
        keys: seed of the run, epoch, and view (0 query, 1 key).
        sample_N: identity of each sample in its data set.
    """
    base = hash_of(*keys, sample_N.astype(np.uint64))

    def draw(stream: int) -> Floats:
        return uniform(hash_of(base, stream))

    jitter = draw(DRAW_JITTER) < recipe.jitter_probability
    strength = np.array(recipe.jitter)
    spread = np.stack([draw(DRAW_FACTORS + i) for i in range(4)], axis=1) * 2 - 1
    neutral = np.array([1.0, 1.0, 1.0, 0.0])
    factors = neutral + spread * strength * jitter[:, None]
    low, high = recipe.blur_sigma_px
    blur = draw(DRAW_BLUR) < recipe.blur_probability
    order_of_each = (draw(DRAW_ORDER) * len(JITTER_ORDERS)).astype(np.int64)
    return ViewParameters(
        crop_xywh_px=_draw_crop(recipe, size_px_N2, base),
        flip=draw(DRAW_FLIP) < recipe.flip_probability,
        jitter=jitter,
        jitter_order=JITTER_ORDERS[order_of_each],
        factors=factors,
        grey=draw(DRAW_GREY) < recipe.grey_probability,
        sigma_px=np.where(blur, low + (high - low) * draw(DRAW_SIGMA), 0.0),
        solarise=draw(DRAW_SOLARISE) < recipe.solarise_probability,
        grey_first=recipe.grey_first,
    )


def _draw_crop(recipe: ViewRecipe, size_px_N2: Ints, base: UInts) -> Ints:
    """Windows as torchvision's ``RandomResizedCrop`` draws them: the first of ten that fits.

    Where none fits: the largest window in the middle whose aspect is within the recipe's.
    """
    width, height = size_px_N2[:, :1].astype(np.float64), size_px_N2[:, 1:].astype(np.float64)
    attempts = np.arange(CROP_ATTEMPTS, dtype=np.uint64)
    base_N1 = base[:, None]
    low, high = recipe.crop_area
    area = width * height * (low + (high - low) * uniform(hash_of(base_N1, DRAW_AREA + attempts)))
    log_low, log_high = np.log(recipe.crop_aspect)
    log_aspect = log_low + (log_high - log_low) * uniform(hash_of(base_N1, DRAW_ASPECT + attempts))
    aspect = np.exp(log_aspect)
    crop_width = np.rint(np.sqrt(area * aspect))
    crop_height = np.rint(np.sqrt(area / aspect))
    fits = (crop_width > 0) & (crop_width <= width) & (crop_height > 0) & (crop_height <= height)

    first = (np.arange(len(fits)), fits.argmax(axis=1))
    width, height = width[:, 0], height[:, 0]
    fallback_width, fallback_height = _centred(width, height, recipe.crop_aspect)
    found = fits.any(axis=1)
    w = np.where(found, crop_width[first], fallback_width)
    h = np.where(found, crop_height[first], fallback_height)
    draw_x = uniform(hash_of(base_N1, DRAW_X + attempts))[first]
    draw_y = uniform(hash_of(base_N1, DRAW_Y + attempts))[first]
    x = np.where(found, np.floor(draw_x * (width - w + 1)), (width - w) // 2)
    y = np.where(found, np.floor(draw_y * (height - h + 1)), (height - h) // 2)
    return np.stack([x, y, w, h], axis=1).astype(np.int64)


def _centred(
    width: Floats, height: Floats, crop_aspect: tuple[float, float]
) -> tuple[Floats, Floats]:
    low, high = crop_aspect
    aspect = width / height
    crop_width = np.where(aspect > high, np.rint(height * high), width)
    crop_height = np.where(aspect < low, np.rint(width / low), height)
    return np.maximum(crop_width, 1), np.maximum(crop_height, 1)


@dataclass(frozen=True)
class ViewRequest:
    """What an engine needs for one batch: N encoded pictures and the numbers of their views."""

    pictures: list[NDArray[np.uint8]]
    views: tuple[ViewParameters, ...]
