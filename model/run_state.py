"""Everything of a run that a checkpoint holds and a resume puts back."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from model.collectives import all_equal, average, rank
from model.key_queue import KeyQueue
from model.moco import MoCo


class RunState:
    """The state of both encoders, the queue, the optimiser and the loss scaler.

    Nothing else has any: order, views and shuffle are functions of the seed and the step.

    Args:
        moco: both encoders, without a wrapper.
        queue: the keys.
        optimizer: of the query encoder.
        scaler: of the loss under float16, or None.
    """

    def __init__(
        self,
        moco: MoCo,
        queue: KeyQueue,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self._moco = moco
        self._queue = queue
        self._optimizer = optimizer
        self._scaler = scaler

    def save(self, run: Path, step: int, identity: dict[str, Any], keep: int) -> None:
        """Write a checkpoint; every rank calls it, the first one writes.

        Running statistics are averaged over the ranks first: each rank has moved its own by its
        own groups, and the mean is what one process with all the groups would have.

        Raises:
            RuntimeError: if encoders or queue differ between ranks, which is a defect.
            OSError: if it cannot be written.
        """
        average(t for t in self._moco.buffers() if t.is_floating_point())
        if not all_equal([*self._moco.state_dict().values(), self._queue.rows_KD]):
            raise RuntimeError(f"encoders or queues differ between the processes at step {step}")
        if rank() == 0:
            optimiser, plain = flatten_optimiser(self._optimizer)
            tensors = {
                "encoder_q": self._moco.encoder_q.state_dict(),
                "encoder_k": self._moco.encoder_k.state_dict(),
                "queue": {"rows_KD": self._queue.rows_KD},
                "optimiser": optimiser,
            }
            state = {
                **identity,
                "queue_place": self._queue.place,
                "optimiser": plain,
                "scaler": self._scaler.state_dict() if self._scaler else None,
            }
            save_checkpoint(run, step, tensors, state, keep)

    def load(self, found: Checkpoint) -> None:
        """Put a checkpoint's state in place, on every rank.

        Raises:
            CheckpointError: if its tensors do not fit this run's encoder or queue.
        """
        try:
            self._moco.encoder_q.load_state_dict(found.tensors["encoder_q"])
            self._moco.encoder_k.load_state_dict(found.tensors["encoder_k"])
            self._queue.load_state_dict(found.tensors["queue"])
        except (RuntimeError, KeyError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise CheckpointError(f"{found.folder} does not fit this run: {reason}") from error
        self._queue.place = int(found.state["queue_place"])
        restore_optimiser(self._optimizer, found.tensors["optimiser"], found.state["optimiser"])
        if self._scaler and found.state["scaler"]:
            self._scaler.load_state_dict(found.state["scaler"])


def flatten_optimiser(
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as named tensors (``number.name``) and plain values."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for number, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{name}"] = value
            else:
                values[f"{number}.{name}"] = value
    return tensors, {"values": values, "groups": state["param_groups"]}


def restore_optimiser(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]
) -> None:
    """The inverse of ``flatten_optimiser``."""
    state: dict[int, dict[str, Any]] = {}
    for dotted, value in {**plain["values"], **tensors}.items():
        number, _, name = dotted.partition(".")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": plain["groups"]})
