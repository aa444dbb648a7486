"""Core-milliseconds of each operation of a view at 224 pixels: the compiled kernels and Pillow.

    python tests/bench/view_operations.py

A JSON line for each operation: the median of five interleaved rounds over the same pictures (full-
size ones of $MOCO_TEST_DATA or ../shared/data, else synthetic 500 x 375 ones), in CPU time of one
thread, and Pillow's time over the kernel's with its range.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from pipeline.blur_kernel import blur, blur_boxes
from pipeline.colour_kernels import (
    BRIGHTNESS,
    CONTRAST,
    GREY,
    HUE,
    SATURATION,
    look_up,
    recolour,
)
from pipeline.data_config import IMAGENET_MEAN, IMAGENET_STD
from pipeline.kernel_views import decoded_rgb, level_tables
from pipeline.resize_kernel import PILLOW_REORDERS, resize
from pipeline.torch_views import decode, normalise
from pipeline.view_recipe import PAIRS, draw_view
from tests.bench.two_views import picture_folder

ROUNDS, PICTURES, SIDE = 5, 50, 224
Work = Callable[[], object]


def recolourings() -> list[tuple[str, int, float, Callable[..., Any]]]:
    """Name, kernel's step and strength, and the same by torchvision."""
    return [
        ("brightness", BRIGHTNESS, 1.3, lambda view: TF.adjust_brightness(view, 1.3)),
        ("contrast", CONTRAST, 1.3, lambda view: TF.adjust_contrast(view, 1.3)),
        ("saturation", SATURATION, 1.3, lambda view: TF.adjust_saturation(view, 1.3)),
        ("hue", HUE, int(0.1 * 255), lambda view: TF.adjust_hue(view, 0.1)),
        ("grey", GREY, 0.0, lambda view: TF.rgb_to_grayscale(view, 3)),
    ]


def operations(encoded: list[np.ndarray]) -> dict[str, tuple[Work, Work]]:
    """By name: what does it to all pictures, by kernels and by Pillow with torchvision."""
    images = [decode(picture) for picture in encoded]
    pixels = [np.array(image) for image in images]
    lines = [array.reshape(len(array), -1) for array in pixels]
    sizes = np.array([image.size for image in images])
    windows = draw_view(PAIRS["moco-v2"][0], sizes, (0, 0, 0), np.arange(len(images))).crop_xywh_px
    views = np.empty((len(images), SIDE, 3, SIDE), np.uint8)
    for line, window, view in zip(lines, windows, views, strict=True):
        resize(line, window, False, PILLOW_REORDERS, view)
    pictures = [Image.fromarray(view.transpose(0, 2, 1).copy()) for view in views]
    box, tables = blur_boxes(np.array([1.0]))[0], level_tables(IMAGENET_MEAN, IMAGENET_STD)
    scratch, out = views[0].copy(), np.empty((3, SIDE, SIDE), np.float32)

    def resize_all() -> None:
        for line, window in zip(lines, windows, strict=True):
            resize(line, window, False, PILLOW_REORDERS, scratch)

    def crop_all() -> None:
        for image, (x, y, w, h) in zip(images, windows.tolist(), strict=True):
            TF.resized_crop(image, y, x, h, w, [SIDE, SIDE])

    work: dict[str, tuple[Work, Work]] = {
        "decode": (
            lambda: [decoded_rgb(picture) for picture in encoded],
            lambda: [decode(picture) for picture in encoded],
        ),
        "crop and resize": (resize_all, crop_all),
        "blur, sigma 1": (
            lambda: [blur(view, box) for view in views],
            lambda: [view.filter(ImageFilter.GaussianBlur(1.0)) for view in pictures],
        ),
        "to float and normalise": (
            lambda: [look_up(view, tables[0], out) for view in views],
            lambda: [normalise([view], IMAGENET_MEAN, IMAGENET_STD) for view in pictures],
        ),
    }
    for name, step, strength, adjust in recolourings():
        steps, strengths = np.array([step], np.int8), np.array([strength], np.float32)
        work[name] = (
            lambda steps=steps, strengths=strengths: [  # type: ignore[misc]
                recolour(view, steps, strengths) for view in views
            ],
            lambda adjust=adjust: [adjust(view) for view in pictures],  # type: ignore[misc]
        )
    return work


def core_ms(work: Work, count: int) -> float:
    """CPU time of this thread for each picture, in milliseconds."""
    started = time.thread_time()
    work()
    return (time.thread_time() - started) / count * 1000


def main() -> None:
    """Measure every operation in turns and print what came out."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        what = picture_folder(Path(name, "pictures"))
        files = sorted(Path(name, "pictures", "all").iterdir())
        encoded = [
            np.frombuffer(path.read_bytes(), np.uint8) for path in files[:: len(files) // PICTURES]
        ]
    for operation, sides in operations(encoded).items():
        for work in sides:
            work()  # compiles, and fills the caches
        rounds = [[core_ms(work, len(encoded)) for work in sides] for _ in range(ROUNDS)]
        kernel, pillow = (statistics.median(found) for found in zip(*rounds, strict=True))
        ratios = sorted(b / a for a, b in rounds)
        line = {
            "operation": operation,
            "pictures": what,
            "kernel_ms": round(kernel, 3),
            "pillow_ms": round(pillow, 3),
            "ratio": round(statistics.median(ratios), 1),
            "range": [round(ratios[0], 1), round(ratios[-1], 1)],
        }
        sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
