"""What a run tells while it goes on: live display or plain lines, run.jsonl, tracker, curve.

Only the main process has a report.
"""

import json
import math
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from eval.alarms import Alarm, Alarms
from eval.curve import draw_curve
from eval.hardware_watch import describe_hardware
from eval.health_watch import describe

LOG_NAME = "run.jsonl"
CURVE_NAME = "curve.png"
SPARK = "▁▂▃▄▅▆▇█"


def duration(seconds: float) -> str:
    """1 h 02 min, 3 min 04 s, 5 s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole} s"


class RunReport:
    """Reports of one run.

    Args:
        run: its folder; None on all processes but the main one, whose reports go nowhere.
        title: for the display.
        total_steps: of the whole run.
        first_step: steps done before, by an earlier part of the run.
        track: receives every logged value, for TensorBoard and the like.
        alarms: told what is logged; what they raise is reported.
        console: where to print; a live display on a terminal, else plain lines.
    """

    def __init__(
        self,
        run: Path | None,
        title: str,
        *,
        total_steps: int,
        first_step: int,
        track: Callable[[dict[str, Any], int], None],
        alarms: Alarms,
        console: Console,
    ) -> None:
        self._run = run
        self._title = title
        self._total_steps = total_steps
        self._first_step = first_step
        self._chance_loss = alarms.chance_loss
        self._track = track
        self._alarms = alarms
        self._alarm: str | None = None
        self._console = console
        self._latest: dict[str, float] = {}
        self._losses: deque[float] = deque(maxlen=40)
        self._knn: float | None = None
        self._health: list[tuple[str, str]] = []
        self._started = time.monotonic()
        self._steps = Progress(
            TextColumn("step"), BarColumn(bar_width=None), MofNCompleteColumn(), console=console
        )
        self._bar = self._steps.add_task("step", total=total_steps, completed=first_step)
        is_live = console.is_terminal and run is not None
        self._live = Live(console=console, refresh_per_second=2) if is_live else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
            self._live.update(self._panel([("waiting", "for the first report")]))
        if self._run is not None:
            self._raise(self._first_step, self._alarms.start())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def note(self, message: str) -> None:
        """One line for the person who watches."""
        self._console.print(message, soft_wrap=True, highlight=False, markup=False, emoji=False)

    def advance(self, step: int) -> None:
        """Move the bar of a live display; between reports it may take minutes."""
        if self._live is not None:
            self._steps.update(self._bar, completed=step)

    def steps(self, step: int, values: dict[str, float]) -> None:
        """Report ``step`` steps done; ``values`` by the names that the log and tracker use."""
        if self._run is None:
            return
        self._latest = values
        self._losses.append(values["loss"])
        self._write(step, values)
        if self._live is None:
            self.note(self._line(step))
        else:
            self.advance(step)
            self._live.update(self._panel(self._shown(step)))

    def health(self, step: int, values: dict[str, Any]) -> None:
        """Report a look at the dictionary, by ``HealthWatch``, after ``steps``."""
        self._health = describe(values)
        self._write(step, {**values, "chance_loss": self._chance_loss})
        if self._live is None:
            self.note(f"step {step}: " + "  ".join(f"{n} {v}" for n, v in self._health))
        self._raise(step, self._alarms.look(step, {**self._latest, **values}))

    def skipped(self, step: int, count: int) -> None:
        """Report a step that was left out; ``count`` of them since the run's first step."""
        self._write(step, {"skipped_steps": count})
        self.note(f"step {step}: its gradient is not finite, left out ({count} so far)")

    def knn(self, step: int, top1: float) -> None:
        """Report a kNN score of the encoder as it is after ``step`` steps, in [0, 1]."""
        self._knn = top1
        self._write(step, {"knn_top1": top1})
        if self._live is None:
            self.note(f"step {step}: kNN top-1 {top1:.2%}")
        if "pretext_accuracy" in self._latest:
            self._raise(step, self._alarms.knn(self._latest["pretext_accuracy"], top1))

    def knn_failed(self, step: int, reason: str) -> None:
        """Report that the encoder of ``step`` steps could not be judged; the run goes on."""
        self._write(step, {"knn_error": reason})
        self.note(f"step {step}: no kNN score, the run goes on: {reason}")

    def _raise(self, step: int, alarms: list[Alarm]) -> None:
        for alarm in alarms:
            self._alarm = f"step {step}: {alarm.text}"
            self._write(step, {"alarm": alarm.name, "alarm_text": alarm.text})
            line = Text(f"step {step}: alarm: {alarm.text}", style="bold red")
            self._console.print(line, soft_wrap=True)  # above the live display, where it stays

    def finish(self) -> None:
        """Draw the curve of the whole run."""
        if self._run is not None and (self._run / LOG_NAME).exists():
            draw_curve(self._run / LOG_NAME, self._run / CURVE_NAME, self._chance_loss)

    def _write(self, step: int, values: dict[str, Any]) -> None:
        if self._run is None:
            return
        with (self._run / LOG_NAME).open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        self._track(values, step)

    def _time_left(self, step: int) -> str:
        done = step - self._first_step
        spent = time.monotonic() - self._started
        return duration(spent / max(done, 1) * (self._total_steps - step))

    def _shown(self, step: int) -> list[tuple[str, str]]:
        values = self._latest
        return [
            ("loss", f"{values['loss']:.3f} (chance {self._chance_loss:.2f})"),
            ("pretext accuracy", f"{values['pretext_accuracy']:.1%}"),
            ("speed", f"{values['images_per_second']:,.0f} images/s"),
            ("waiting for data", f"{values['data_wait_share']:.1%}"),
            (
                "so far",
                f"{values['images_seen']:,.0f} images in {duration(values['training_seconds'])}",
            ),
            *describe_hardware(values),
            ("learning rate", f"{values['learning_rate']:.4g}"),
            ("kNN top-1", "not asked for" if self._knn is None else f"{self._knn:.2%}"),
            ("time left", self._time_left(step)),
        ]

    def _line(self, step: int) -> str:
        rest = "  ".join(f"{name} {value}" for name, value in self._shown(step))
        return f"step {step}/{self._total_steps}  {rest}"

    def _panel(self, shown: list[tuple[str, str]]) -> Panel:
        table = Table.grid(padding=(0, 2))
        for name, value in shown:
            table.add_row(f"[dim]{name}[/]", value)
        if self._losses:
            table.add_row("[dim]recent loss[/]", sparkline(list(self._losses)))
        for name, value in self._health:
            table.add_row(f"[dim]{name}[/]", value)
        if self._alarm is not None:
            table.add_row("[bold red]alarm[/]", Text(self._alarm, style="bold red"))
        return Panel(Group(self._steps, table), title=self._title, border_style="cyan")


def sparkline(values: list[float]) -> str:
    """Values as a row of bars, the lowest and the highest at the two ends."""
    low, high = min(values), max(values)
    scale = (len(SPARK) - 1) / (high - low) if high > low else 0
    return "".join(SPARK[round((value - low) * scale)] for value in values)


def trim_log(path: Path, step: int) -> None:
    """Drop what an earlier part of the run logged after the checkpoint that is resumed from."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(errors="replace").splitlines() if step_of(line) <= step]
    part = path.with_name(f".{path.name}.part")
    part.write_text("".join(f"{line}\n" for line in kept))
    part.replace(path)


def step_of(line: str) -> float:
    """The step of a logged line; infinite for a line that a kill left half-written."""
    try:
        logged: dict[str, Any] = json.loads(line)
        return float(logged["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf
