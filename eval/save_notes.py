"""What a run says of its saves."""

from rich.console import Console

from pipeline.program import explain


def say_not_saved(console: Console, step: int, error: OSError) -> None:
    """Tell of a checkpoint that could not be written; the run goes on."""
    _warn(
        console,
        f"the checkpoint of step {step} could not be written ({explain(error) or error}); the "
        "older ones stand, the run goes on and saves again when the next one is due",
    )


def say_waited(console: Console, step: int, waited_s: float) -> None:
    """Tell that the training waits for the disk."""
    _warn(
        console,
        f"step {step}: saves have waited {waited_s:.0f} s so far for the one before to be written, "
        "and the training with them: save less often (--save-every), or to a faster disk",
    )


def _warn(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, style="yellow", markup=False, emoji=False)
