"""Settings from the command line: tyro over a frozen dataclass, and one line for what is wrong."""

import contextlib
import io
import re
from collections.abc import Sequence
from typing import TypeVar

import tyro

from pipeline.program import InputError

T = TypeVar("T")


def parse_flags(
    kind: type[T],
    description: str | None,
    args: Sequence[str] | None = None,
    default: T | None = None,
) -> T:
    """The settings of class ``kind`` that a command line gives.

    Args:
        kind: a frozen dataclass.
        description: what --help says of the program.
        args: of the command line; None: those of this process.
        default: settings that the flags change; None: those of the class.

    Raises:
        InputError: one line, for a flag that does not exist, a value that does not fit its type
            or that the settings themselves refuse, or an argument that is missing.
    """
    said = io.StringIO()
    start = tyro.MISSING_NONPROP if default is None else default
    try:
        # tyro draws a box of several lines around an error and leaves.
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=args, description=description, default=start)
    except SystemExit as end:
        if end.code in (0, None):  # --help
            raise
        raise InputError(one_line(said.getvalue())) from None
    except ValueError as error:  # a setting that its own class refuses
        raise InputError(str(error)) from error


def require_at_least_1(settings: object, *names: str, prefix: str = "") -> None:
    """See that these settings of a program are.

    Args:
        settings: that have them.
        names: of the settings.
        prefix: of their flags, with its dot.

    Raises:
        InputError: naming the flag of the first that is not, and its value.
    """
    for name in names:
        if getattr(settings, name) < 1:
            flag = f"--{prefix}{name.replace('_', '-')}"
            raise InputError(f"{flag} {getattr(settings, name)}: give a number of at least 1")


def one_line(box: str) -> str:
    """What a box of tyro says, as one line: its first part, and the flag that may be meant."""
    parts: list[list[str]] = [[]]
    for line in box.splitlines():
        text = line.strip("│ ")
        if re.fullmatch("─+|-{3,}", text):
            parts.append([])
        elif text and not text.startswith(("╭", "╰")):
            parts[-1].append(text)
    if "╭" not in box and len(parts) > 1:  # drawn for a terminal without Unicode: first the title
        del parts[0]
    said = " ".join(parts[0])
    # "Error parsing moco: --moco.queue 0: give ..." names the flag twice.
    # A class of ours that refuses its values is no word of the command line either.
    said = re.sub(r"^Error parsing (\S+: (?=--)|[A-Z]\w+: )", "", said)
    near = [line for part in parts[1:] for line in part]
    if near and near[0].startswith("Perhaps you meant"):
        flags = [match[0] for line in near[1:] if (match := re.match(r"--[\w.-]+", line))]
        if flags:
            said += f": did you mean {flags[0]}?"
    return f"{said.rstrip('.')} (--help lists every flag)"
