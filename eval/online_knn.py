"""The kNN score of a run, computed from a copy of its query encoder while it trains on.

The loop waits for the copy of the weights only. A thread makes features and score: on a GPU on a
stream of its own, on a CPU with a quarter of the threads. It draws no random number and touches
nothing of the run, which goes on bit by bit as without it. One score is computed at a time; what
falls due meanwhile is left out, and said.
"""

import copy
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import torch
from torch import nn

from eval.judged import Judged
from eval.knn import KnnProtocol, knn_of_shards
from eval.run_config import TrainConfig
from eval.run_report import RunReport
from eval.weights_source import eval_view_of
from model.stopping import Agreement
from pipeline.data_config import cache_of, cpu_threads
from pipeline.program import first_line

# Pictures at a time. A stop waits for one such batch at most, and on a GPU it needs memory beside
# the training: about 1 GiB for a ResNet-50 at 224 px.
BATCH_CPU, BATCH_GPU = 32, 128
# Of the cores for a score beside the training.
SHARE_OF_THREADS = 4
POLL_S = 0.2


class DroppedError(Exception):
    """The run does not wait for this score."""


class OnlineKnn:
    """Scores of the query encoder during a run; a context, which drops what is not finished.

    Args:
        config: of the run.
        backbone: of its query encoder, as it is trained.
        device: where it is trained and judged.
        report: told the scores and of what came between.
        is_judge: whether this process judges. One does, the others have nothing to wait for.
    """

    def __init__(
        self,
        config: TrainConfig,
        backbone: nn.Module,
        device: torch.device,
        report: RunReport,
        *,
        is_judge: bool,
    ) -> None:
        self._config = config
        self._backbone = backbone
        self._device = device
        self._report = report
        self._is_judge = is_judge and config.knn_train is not None
        self._copy: nn.Module | None = None
        self._thread: threading.Thread | None = None
        self._dropped = threading.Event()
        self._step = 0
        self._outcome: float | Exception = 0.0
        self._last_step: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._drop()

    def after(self, step: int, *, is_last: bool) -> None:
        """Report the score that has come, and begin the next one if it is due; after every step.

        Args:
            step: steps done.
            is_last: whether they are all; the weights stay as they are, ``finish`` has them judged.
        """
        if not self._is_judge:
            return
        self._report_outcome()
        if is_last:
            self._last_step = step
        elif step % self._config.knn_every == 0:
            if self._thread is None:
                self._begin(step, beside_training=True)
            else:
                self._report.note(
                    f"step {step}: no kNN score, that of step {self._step} is being computed still "
                    "(--knn-every is the number of steps between them)"
                )

    def finish(self, agreement: Agreement, stopping_signal: Callable[[], int]) -> None:
        """Wait for the scores that are not there yet; every process calls it, after the last step.

        All wait for the judge in short collectives, so that none of them meets a time limit.

        Args:
            agreement: on two wishes, with which nothing else is agreed any more.
            stopping_signal: number of a signal after which nothing is waited for; 0 for none.
        """
        agreement.on(0, 1)  # among several processes an answer is that to the call before
        while True:
            signal, goes_on = agreement.on(stopping_signal(), self._goes_on())
            if signal or not goes_on:
                break
            time.sleep(POLL_S)
        self._drop()

    def _goes_on(self) -> bool:
        self._report_outcome()
        if self._thread is None and self._last_step is not None:
            step, self._last_step = self._last_step, None
            self._begin(step, beside_training=False)
        return self._thread is not None

    def _begin(self, step: int, *, beside_training: bool) -> None:
        if self._copy is None:
            self._copy = copy.deepcopy(self._backbone)
        else:
            self._copy.load_state_dict(self._backbone.state_dict())
        is_copied = torch.cuda.Event() if self._device.type == "cuda" else None
        if is_copied is not None:
            is_copied.record()
        self._step = step
        self._dropped.clear()
        begun = threading.Event()
        arguments = (step, beside_training, is_copied, begun)
        self._thread = threading.Thread(target=self._judge, args=arguments, name="online-knn")
        threads = torch.get_num_threads()
        self._thread.start()
        begun.wait()
        # OpenMP's number of threads is the other thread's own, PyTorch's the process's.
        torch.set_num_threads(threads)

    def _judge(
        self,
        step: int,
        beside_training: bool,
        is_copied: torch.cuda.Event | None,
        begun: threading.Event,
    ) -> None:
        threads = cpu_threads(self._config.data)
        if beside_training:
            threads = max(1, threads // SHARE_OF_THREADS)
        torch.set_num_threads(threads)
        begun.set()
        try:
            with own_stream(self._device, is_copied):
                self._outcome = self._top1(step, threads)
        except Exception as error:  # a score is not worth a run: the loop says it
            self._outcome = error

    def _top1(self, step: int, threads: int) -> float:
        config, protocol = self._config, KnnProtocol()
        assert self._copy is not None and config.knn_train and config.knn_test
        view = eval_view_of(config.data, protocol.interpolation)
        result = knn_of_shards(
            Judged(self._copy, view, {"encoder": "encoder_q", "step": step}),
            config.knn_train,
            config.knn_test,
            protocol,
            device=self._device,
            batch=BATCH_GPU if self._device.type == "cuda" else BATCH_CPU,
            cache=cache_of(config.data),
            threads=threads,
            advance=self._end_if_dropped,
        )
        top1: float = result["top1"]
        return top1

    def _end_if_dropped(self, _pictures: int) -> None:
        if self._dropped.is_set():
            raise DroppedError

    def _drop(self) -> None:
        if self._thread is not None:
            self._dropped.set()
            self._thread.join()
            self._report_outcome()

    def _report_outcome(self) -> None:
        if self._thread is None or self._thread.is_alive():
            return
        self._thread.join()
        self._thread = None
        if isinstance(self._outcome, DroppedError):
            self._report.note(
                f"the kNN score of step {self._step} was not finished and is dropped; "
                "eval/knn.py judges a checkpoint"
            )
        elif isinstance(self._outcome, Exception):
            self._report.knn_failed(self._step, first_line(self._outcome))
        else:
            self._report.knn(self._step, self._outcome)


@contextmanager
def own_stream(device: torch.device, is_copied: torch.cuda.Event | None) -> Iterator[None]:
    """On a GPU a stream that begins after an event and is empty at the end; on a CPU nothing."""
    if is_copied is None:
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_event(is_copied)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        stream.synchronize()  # else the next copy could overwrite weights that are still read
