"""Everything of a run that a checkpoint holds and a resume puts back."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.checkpoint import Checkpoint, CheckpointError
from model.collectives import all_equal, average, gather, rank, world_size
from model.dictionary import Dictionary
from model.moco import QueryEncoder


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint will hold: its step, tensors by file and name, and plain values."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class RunState:
    """The state of the encoders, the dictionary, the optimiser and the loss scaler.

    Nothing else has any: order, views and shuffle are functions of the seed and the step.

    Args:
        moco: the encoders, without a wrapper.
        dictionary: what queries are compared with.
        optimizer: of the query encoder.
        scaler: of the loss under float16, or None.
    """

    def __init__(
        self,
        moco: QueryEncoder,
        dictionary: Dictionary,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self._moco = moco
        self._dictionary = dictionary
        self._optimizer = optimizer
        self._scaler = scaler
        self._host: dict[str, Tensor] = {}

    def snapshot(self, step: int, identity: dict[str, Any]) -> Snapshot | None:
        """A copy of the state on the host; every rank calls it, the first one gets it.

        Saved running statistics are the mean over the ranks: each rank has moved its own by its
        own groups, and the mean is what one process with all the groups would have. Each rank's
        own are saved beside it, for the resume on as many ranks to be exact.

        Args:
            step: steps done.
            identity: plain values that the checkpoint holds too.

        Returns:
            The copy, good until the next one is taken, because its memory is used again.

        Raises:
            RuntimeError: if encoders or dictionary differ between ranks, which is a defect.
        """
        if not all_equal([*self._moco.parameters(), *self._dictionary.buffers()]):
            raise RuntimeError(
                f"encoders or dictionaries differ between the processes at step {step}"
            )
        mean_S = flat_statistics(self._moco)
        statistics_WS = gather(mean_S[None])
        average([mean_S])
        if rank() != 0:
            return None
        optimiser, plain = flatten_optimiser(self._optimizer)
        groups = {name: part.state_dict() for name, part in self._parts()}
        groups["optimiser"] = optimiser
        if world_size() > 1:
            groups["rank_statistics"] = {"statistics_WS": statistics_WS}
        tensors = {name: self._on_host(name, group) for name, group in groups.items()}
        if statistics_WS.is_cuda:
            torch.cuda.synchronize()
        if world_size() > 1:
            mean_S = mean_S.cpu()
            for name, network in self._moco.named_children():
                mean_S = fill(tensors[name], statistics_of(network), mean_S)
        state = {
            **identity,
            **self._dictionary.plain_state(),
            "optimiser": plain,
            "scaler": self._scaler.state_dict() if self._scaler else None,
        }
        return Snapshot(step, tensors, state)

    def _on_host(self, group: str, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies in memory that the next snapshot uses again, as fresh pages cost time."""
        for name, tensor in named.items():
            key = f"{group}/{name}"
            if key not in self._host:
                self._host[key] = torch.empty(
                    tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda
                )
            self._host[key].copy_(tensor.detach(), non_blocking=True)
        return {name: self._host[f"{group}/{name}"] for name in named}

    def _parts(self) -> list[tuple[str, nn.Module]]:
        """What has tensors of its own: encoders, predictor and dictionary, as far as there are."""
        parts = [*self._moco.named_children(), (self._dictionary.name, self._dictionary)]
        return [(name, part) for name, part in parts if part.state_dict()]

    def load(self, found: Checkpoint) -> None:
        """Put a checkpoint's state in place, on every rank.

        Raises:
            CheckpointError: if its tensors do not fit this run's encoders or dictionary.
        """
        try:
            for name, part in self._parts():
                part.load_state_dict(found.tensors[name])
        except (RuntimeError, KeyError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise CheckpointError(f"{found.folder} does not fit this run: {reason}") from error
        own = found.tensors.get("rank_statistics", {}).get("statistics_WS")
        if own is not None and len(own) == world_size():
            rest_S = own[rank()]
            for network in self._moco.children():
                rest_S = fill(network.state_dict(), statistics_of(network), rest_S)
        self._dictionary.load_plain_state(found.state)
        restore_optimiser(self._optimizer, found.tensors["optimiser"], found.state["optimiser"])
        if self._scaler and found.state["scaler"]:
            self._scaler.load_state_dict(found.state["scaler"])


def statistics_of(module: nn.Module) -> list[str]:
    """Names of the buffers that each rank moves by its own pictures."""
    return [name for name, buffer in module.named_buffers() if buffer.is_floating_point()]


def flat_statistics(moco: nn.Module) -> Tensor:
    """The running statistics of each network, in the order of the networks, ``[S]``."""
    parts = [
        dict(network.named_buffers())[name].flatten()
        for network in moco.children()
        for name in statistics_of(network)
    ]
    return torch.cat(parts) if parts else next(moco.parameters()).new_empty(0)


def fill(tensors: dict[str, Tensor], names: list[str], flat_S: Tensor) -> Tensor:
    """Write values that lie end to end into the tensors of these names; what is left of them."""
    for name in names:
        count = tensors[name].numel()
        tensors[name].copy_(flat_S[:count].view(tensors[name].shape))
        flat_S = flat_S[count:]
    return flat_S


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
    # Which kernel is used is no part of the state: older checkpoints name others.
    own = [{k: g[k] for k in ("fused", "foreach") if k in g} for g in optimizer.param_groups]
    groups = [{**saved, **mine} for saved, mine in zip(plain["groups"], own, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.dim() and value.stride() != parameter.stride():
                # Fused kernels go through memory: it must be laid out as the parameter's.
                entries[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
