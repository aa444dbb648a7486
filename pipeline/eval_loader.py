"""Every picture of a folder of shards once, in order, as evaluation views with labels.

Letters in names: N pictures, H W pixels.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.program import InputError
from pipeline.shard_store import BadSampleError, ShardStore
from pipeline.torch_views import decode, eval_picture, normalise

try:
    from pipeline import dali_views
except ImportError:  # DALI has wheels for Linux only
    dali_views = None  # type: ignore[assignment]

Bytes = NDArray[np.uint8]
Triple = tuple[float, float, float]
Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True, kw_only=True)
class EvalView:
    """How a picture is shown to an encoder that is judged: part of every result's protocol."""

    resize_px: int
    crop_px: int
    interpolation: Interpolation
    mean: Triple
    std: Triple


class EvalLoader:
    """Iterator of ``(views_N3HW float32, label_N int64)``; the last batch may be smaller.

    Samples whose bytes are damaged are left out and counted in ``skipped``.

    Args:
        store: the shards.
        view: resize, crop and normalisation.
        batch: pictures at a time.
        device: where views are made and lie.
        threads: of the CPU, for decoding.
    """

    def __init__(
        self, store: ShardStore, view: EvalView, *, batch: int, device: torch.device, threads: int
    ) -> None:
        self._store = store
        self._view = view
        self._batch = batch
        self._device = device
        self._threads = threads
        self.skipped = 0

    def __iter__(self) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        if dali_views is None:
            return self._with_torchvision()
        return self._with_dali()

    def _encoded(self) -> Iterator[tuple[list[Bytes], NDArray[np.int64]]]:
        pictures: list[Bytes] = []
        labels: list[int] = []
        for shard in range(len(self._store.manifest.shards)):
            for index, record in enumerate(self._store.records(shard)):
                try:
                    pictures.append(self._store.picture(shard, index))
                except BadSampleError:
                    self.skipped += 1
                    continue
                labels.append(int(record["label"]))
                if len(pictures) == self._batch:
                    yield pictures, np.array(labels, dtype=np.int64)
                    pictures, labels = [], []
        if pictures:
            yield pictures, np.array(labels, dtype=np.int64)

    def _with_torchvision(self) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        view = self._view
        for pictures, label_N in self._encoded():
            shown = [
                eval_picture(decode(picture), view.resize_px, view.crop_px, view.interpolation)
                for picture in pictures
            ]
            yield normalise(shown, view.mean, view.std).to(self._device), label_N

    def _with_dali(self) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        batches = self._encoded()
        in_flight: deque[tuple[list[Any], NDArray[np.int64]]] = deque()

        def feed() -> list[Any]:
            pictures, label_N = next(batches)  # StopIteration is how DALI learns of the end
            in_flight.append(([pictures], label_N))
            return in_flight[-1][0]

        view = self._view
        pipeline = dali_views.eval_graph(
            source=feed,
            resize_px=view.resize_px,
            crop_px=view.crop_px,
            interpolation=view.interpolation,
            normalisation=(view.mean, view.std),
            device="gpu" if self._device.type == "cuda" else "cpu",
            **dali_views.pipeline_arguments(self._batch, self._threads, self._device),
        )
        pipeline.build()
        while True:
            try:
                (views_N3HW,) = dali_views.run(pipeline, self._device)
            except StopIteration:
                return
            except RuntimeError as error:
                raise InputError(
                    f"{self._store.folder} has a picture that cannot be decoded "
                    f"({dali_views.first_reason(str(error))}): pack it again with make_shards"
                ) from error
            _, label_N = in_flight.popleft()
            yield views_N3HW, label_N
