"""What is told of steps that were left out, and when there are too many of them."""

from eval.run_report import RunReport
from eval.step_log import StepLog
from model.step_guard import StepGuard
from pipeline.program import InputError


def report_skipped(
    guard: StepGuard, report: RunReport, log: StepLog, most: int, *, wait: bool
) -> None:
    """Log steps that were left out, and their samples.

    Args:
        guard: of the run.
        report: of the run.
        log: of the samples of such steps, of this process.
        most: in a row, --max-skipped.
        wait: for what became of the newest step too.

    Raises:
        InputError: at as many in a row: the run has lost its way.
    """
    for left in guard.left_out(wait=wait):
        log.write(left.step, left.sample_N)
        report.skipped(left.step, left.skipped)
        if left.in_a_row >= most:
            first = left.step - left.in_a_row + 1
            raise InputError(
                f"no finite gradient in {left.in_a_row} steps in a row, {first} to {left.step}, "
                f"whose samples are in {log.folder}/skipped-*.jsonl: the run has diverged; go on "
                "from its last checkpoint with --precision no, or start again with a lower "
                "--optimiser.lr"
            )
