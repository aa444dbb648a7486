"""Every picture of a folder of shards once, in order, as evaluation views with labels.

Letters in names: N pictures, H W pixels.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.header_check import checked_picture
from pipeline.program import InputError
from pipeline.shard_store import BadSampleError, ShardStore
from pipeline.torch_views import DecodeError, decode, eval_picture, normalise
from pipeline.validate import Limits

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

    def __post_init__(self) -> None:
        if not 1 <= self.crop_px <= self.resize_px:
            raise InputError(
                f"a crop of {self.crop_px} px does not fit a picture whose shorter side is "
                f"{self.resize_px} px: give a --crop-px from 1 to --resize-px"
            )


@dataclass(frozen=True)
class EncodedPictures:
    """A batch before it is decoded; ``rows_N3`` has width, height and label of each picture."""

    pictures: list[Bytes]
    rows_N3: NDArray[np.int64]

    @property
    def size_px_N2(self) -> NDArray[np.int64]:
        """Width and height."""
        return self.rows_N3[:, :2]

    @property
    def label_N(self) -> NDArray[np.int64]:
        """Index of the class, -1 without one."""
        return self.rows_N3[:, 2]


class EvalLoader:
    """Iterator of ``(views_N3HW float32, label_N int64)``; the last batch may be smaller.

    Samples whose bytes or headers are damaged, and those that are too large to be decoded or cannot
    be, are left out and counted in ``skipped``.

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
        self.skipped = 0
        if dali_views is None:
            return self._with_torchvision()
        return self._with_dali()

    def _encoded(self) -> Iterator[EncodedPictures]:
        pictures: list[Bytes] = []
        rows: list[tuple[int, int, int]] = []
        for shard in range(len(self._store.manifest.shards)):
            # The next ones meanwhile, where they have to be fetched.
            self._store.prefetch(range(shard, min(shard + 4, len(self._store.manifest.shards))))
            try:
                records = self._store.records(shard)
            except BadSampleError:
                self.skipped += self._store.manifest.shards[shard].samples
                continue
            for index, record in enumerate(records):
                try:
                    picture, width, height = checked_picture(self._store, shard, index, Limits())
                except BadSampleError:
                    self.skipped += 1
                    continue
                pictures.append(picture)
                rows.append((width, height, int(record["label"])))
                if len(pictures) == self._batch:
                    yield EncodedPictures(pictures, np.array(rows, dtype=np.int64))
                    pictures, rows = [], []
        if pictures:
            yield EncodedPictures(pictures, np.array(rows, dtype=np.int64))

    def _with_torchvision(self) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        view = self._view
        for batch in self._encoded():
            decoded: dict[int, Image.Image] = {}
            for row, picture in enumerate(batch.pictures):
                with suppress(DecodeError):
                    decoded[row] = decode(picture)
            self.skipped += len(batch.pictures) - len(decoded)
            if not decoded:
                continue
            shown = [
                eval_picture(picture, view.resize_px, view.crop_px, view.interpolation)
                for picture in decoded.values()
            ]
            views_N3HW = normalise(shown, view.mean, view.std).to(self._device)
            yield views_N3HW, batch.label_N[list(decoded)]

    def _with_dali(self) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        batches = self._encoded()
        # Inputs are not copied, so they must live until their batch has left the pipeline.
        in_flight: deque[tuple[list[Any], EncodedPictures]] = deque()

        def feed() -> list[Any]:
            batch = next(batches)  # StopIteration is how DALI learns of the end
            in_flight.append((self._inputs(batch), batch))
            return in_flight[-1][0]

        pipeline = self._pipeline(feed, dali_views.PREFETCH_BATCHES)
        while True:
            try:
                (views_N3HW,) = dali_views.run(pipeline, self._device)
            except StopIteration:
                return
            except RuntimeError as error:
                if not dali_views.is_decode_error(error):
                    raise
                _, batch = in_flight.popleft()
                batch = self._decodable(batch, error)
                if batch.pictures:
                    yield self._once(batch), batch.label_N
            else:
                _, batch = in_flight.popleft()
                yield views_N3HW, batch.label_N

    def _once(self, batch: EncodedPictures) -> Tensor:
        """The views of a batch outside the stream."""
        inputs = self._inputs(batch)
        (views_N3HW,) = dali_views.run(self._pipeline(lambda: inputs, 1), self._device)
        return views_N3HW

    def _inputs(self, batch: EncodedPictures) -> list[Any]:
        view = self._view
        return dali_views.eval_inputs(
            batch.pictures, batch.size_px_N2, view.resize_px, view.crop_px
        )

    def _pipeline(self, source: Callable[[], list[Any]], prefetch: int) -> Any:
        view = self._view
        pipeline = dali_views.eval_graph(
            source=source,
            crop_px=view.crop_px,
            interpolation=view.interpolation,
            normalisation=(view.mean, view.std),
            device="gpu" if self._device.type == "cuda" else "cpu",
            **dali_views.pipeline_arguments(self._batch, self._threads, self._device, prefetch),
        )
        pipeline.build()
        return pipeline

    def _decodable(self, batch: EncodedPictures, error: RuntimeError) -> EncodedPictures:
        """What is left of a batch that failed."""
        problems = dali_views.undecodable(batch.pictures, self._device)
        if not problems:
            raise RuntimeError("a batch failed, yet each of its pictures decodes alone") from error
        self.skipped += len(problems)
        rows = [row for row in range(len(batch.pictures)) if row not in problems]
        return EncodedPictures([batch.pictures[row] for row in rows], batch.rows_N3[rows])
