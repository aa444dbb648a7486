"""What a run does about its mirror when it starts: a store that is away ends no run that can go on.

A store that does not answer, or lets nobody read or write, is no reason to leave the checkpoints in
the run's own folder unused. Where the folder has none it is one: a run that is to go on would begin
anew while the store holds its checkpoints.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from eval.remote_checkpoints import RemoteCheckpoints, StoreAwayError
from pipeline.program import InputError
from pipeline.remote_folder import DamagedError, DownError, RemoteError
from pipeline.writable_folder import AT_START, not_writable, try_writing


@dataclass(frozen=True)
class CopiesSeen:
    """The copies of a run's checkpoints, as far as its start can see them."""

    steps: tuple[int, ...] = ()
    """Of those that are there whole, ascending."""
    away: InputError | None = None
    """Why the store could not be asked."""


def copies_at_start(
    url: str, output: Path, say: Callable[..., None], *, has_local: bool, is_to_go_on: bool
) -> CopiesSeen:
    """Which copies there are, after a look whether more can be written.

    Args:
        url: of the mirror.
        output: folder of the run.
        say: prints a line; takes ``style``.
        has_local: whether there are checkpoints in the folder.
        is_to_go_on: whether the run is to go on from a checkpoint, by --resume or a restart.

    Raises:
        InputError: if there is no such bucket, or the store cannot be used and the run is new or
            its folder has no checkpoint: the latter a ``StoreAwayError`` if it does not answer.
    """
    refused = None
    try:
        try_writing(url, AT_START)
    except RemoteError as error:
        if isinstance(error, DamagedError) or not is_to_go_on:
            raise not_writable(url, "--mirror", error) from error
        refused = error
    if isinstance(refused, DownError):
        copies = CopiesSeen(away=StoreAwayError(f"{url} does not serve ({refused})"))
    else:
        copies = listed(url)
        if copies.away and refused:  # it answers, and would say no again
            copies = CopiesSeen(away=InputError(str(copies.away)))
    if copies.away and not (has_local and is_to_go_on):
        raise nothing_to_go_on_from(copies.away, output) if is_to_go_on else copies.away
    if refused is not None and not (has_local or copies.steps):
        raise not_writable(url, "--mirror", refused) from refused
    if copies.away:
        line = f"{copies.away}; going on from the checkpoints in {output}"
        say(f"{line}, and copying later ones once the store serves again", style="yellow")
    elif refused is not None:
        line = f"{url} cannot be written ({refused})"
        say(f"{line}: the run goes on, and copying is tried at each checkpoint", style="yellow")
    return copies


def listed(url: str) -> CopiesSeen:
    """The copies, or why they cannot be listed."""
    try:
        return CopiesSeen(tuple(RemoteCheckpoints(url, AT_START).steps()))
    except InputError as error:
        return CopiesSeen(away=error)


def nothing_to_go_on_from(away: InputError, output: Path) -> InputError:
    """The error for a store that is away while the folder has no intact checkpoint either."""
    problem = f"{away}; {output} has no intact checkpoint, and which the store has is not known"
    return type(away)(f"{problem}: start again when it serves, or leave out --mirror")
