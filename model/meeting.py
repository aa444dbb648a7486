"""How the processes of a run meet: all of them within a time, or one line says which are missing.

Left to PyTorch, a process waits for the others for ten minutes (NCCL) or thirty (gloo), and then
tells of a socket. Launchers on one machine end it before, on several machines not all of them do.
"""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

FOR_EVER_S = 7 * 24 * 3600.0
SHOWN = 8


class MissingRankError(RuntimeError):
    """A process of the run did not come."""


def meet(patience_s: float) -> None:
    """Join the other processes of this run; in a single one does nothing.

    As accelerate and torchrun would, but for two things. Who is missing is known, since each
    process calls its number first. And each start that an agent of theirs makes has keys of its own
    in the store: where the port is fixed, as accelerate's always is, that store outlives a start,
    and the addresses of processes that are gone still stand in it; who reads one before it is
    written anew asks for a connection that nobody takes (seen with torch 2.15 on gloo).

    Args:
        patience_s: to wait for the others; 0 for a week.

    Raises:
        MissingRankError: if they do not all come.
        RuntimeError: if one is gone before it has met the others, or the address cannot be used.
    """
    environment = os.environ
    world, rank = int(environment.get("WORLD_SIZE") or 1), environment.get("RANK")
    if world == 1 or rank is None:
        return
    patience = timedelta(seconds=patience_s or FOR_EVER_S)
    store = dist.PrefixStore(  # type: ignore[attr-defined]
        f"start {environment.get('TORCHELASTIC_RESTART_COUNT', '0')}",
        store_of(int(rank), world, patience),
    )
    call_the_roll(store, int(rank), world, patience)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=int(rank), world_size=world)


def store_of(rank: int, world: int, patience: timedelta) -> Any:
    """What the processes write to before they are connected: the agent's, or the first one's.

    Raises:
        MissingRankError: if the first one does not open it.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_ours = rank == 0 and not is_agents
    try:
        return dist.TCPStore(  # type: ignore[attr-defined]
            address, port, world, is_master=is_ours, timeout=patience, wait_for_workers=False
        )
    except dist.DistNetworkError as error:
        if is_ours:
            raise
        host = "the launcher's agent" if is_agents else "rank 0"
        reason = str(error).strip().splitlines()[0]
        raise MissingRankError(
            f"{host} does not answer at {address}:{port} within {patience.total_seconds():.0f} s "
            f"({reason})"
        ) from error


def call_the_roll(store: Any, rank: int, world: int, patience: timedelta) -> None:
    """Wait until every process has written its number.

    Raises:
        MissingRankError: naming those that have not.
    """
    keys = [f"here {number}" for number in range(world)]
    store.set(keys[rank], "")
    try:
        store.wait(keys, patience)
    except dist.DistStoreError as error:
        missing = [number for number, key in enumerate(keys) if not store.check([key])]
        shown = ", ".join(str(number) for number in missing[:SHOWN])
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise MissingRankError(
            f"of {world} processes rank {shown}{more} did not come within "
            f"{patience.total_seconds():.0f} s"
        ) from error
