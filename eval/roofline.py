"""Which part of a run limits it, by how much, and what can be changed: the arithmetic of it.

Speeds are images per second of one process. The parts read, decode and views run ahead of the
model. On a CPU all four share the cores, so their times add up; with a GPU reading and decoding
have the host's cores, views and model the GPU, and the slowest of them decides.
"""

import statistics
from dataclasses import dataclass
from typing import BinaryIO

import matplotlib

matplotlib.use("Agg")  # no window, also where there is a screen

from matplotlib import pyplot as plt

PARTS = ("read", "decode", "views", "model")
# Of the shorter side to that of a view: 256 for 224, as the evaluation view has it.
RESIZE_MARGIN = 8 / 7
# Below it, the parts hinder each other more than they should.
GOOD_OVERLAP = 0.8
LEAST_SHOWN = 0.001
# Fastest over slowest round, above which something else had a part in it.
STEADY_RANGE = 2.0


@dataclass(frozen=True)
class Speed:
    """Images per second of one part, or of several together, in each round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.rounds)

    @property
    def low(self) -> float:
        """The slowest round."""
        return min(self.rounds)

    @property
    def high(self) -> float:
        """The fastest round."""
        return max(self.rounds)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the speeds were measured with."""

    device: str
    """``cpu`` or ``cuda``."""
    cores: int
    threads: int
    """Of the data path."""
    precision: str
    image_px: int
    shorter_px: float
    """Of the pictures, on average."""
    is_remote: bool


@dataclass(frozen=True)
class Judgement:
    """What limits a run."""

    limit: str
    """The slowest part."""
    factor: float
    """How much faster the next slowest part is."""
    share: dict[str, float]
    """Of the time that an image costs in all parts one after the other."""
    possible: float
    """Images per second if the parts overlapped as well as they can."""
    without_limit: float
    """Likewise, if the slowest part cost nothing."""


def judge(speeds: dict[str, float], setting: Setting) -> Judgement:
    """Compare the speeds of the four parts, each measured alone.

    Args:
        speeds: images per second of ``PARTS``; the reading of one thread, the others with all
            that the process has.
        setting: they were measured with.
    """
    slowest, second = sorted(PARTS, key=lambda part: speeds[part])[:2]
    cost_s = {part: 1 / speeds[part] for part in PARTS}
    total_s = sum(cost_s.values())
    return Judgement(
        limit=slowest,
        factor=speeds[second] / speeds[slowest],
        share={part: cost / total_s for part, cost in cost_s.items()},
        possible=_together(speeds, set(PARTS), setting),
        without_limit=_together(speeds, set(PARTS) - {slowest}, setting),
    )


def _together(speeds: dict[str, float], parts: set[str], setting: Setting) -> float:
    # One thread reads, which leaves the other cores to the other parts.
    cost_s = {part: 1 / speeds[part] for part in parts}
    if setting.device == "cpu":
        if "read" in cost_s:
            cost_s["read"] /= setting.cores
        return 1 / sum(cost_s.values())
    on_gpu = sum(cost_s.get(part, 0.0) for part in ("views", "model"))
    on_host = (cost_s[part] for part in ("read", "decode") if part in cost_s)
    return 1 / max(on_gpu, *on_host)


def advise(judgement: Judgement, together: float, setting: Setting) -> list[str]:
    """What to change, the most effective first; never empty."""
    advice = {
        "read": _advice_reading,
        "decode": _advice_decoding,
        "views": _advice_views,
        "model": _advice_model,
    }[judgement.limit](setting)
    if together < GOOD_OVERLAP * judgement.possible:
        advice.append(
            f"the parts hinder each other: together they reach {together / judgement.possible:.0%} "
            "of what they could; is something else running here, or are there more threads "
            "(--data.threads) than cores?"
        )
    return advice


def _threads(setting: Setting) -> list[str]:
    if setting.threads < setting.cores:
        return [f"--data.threads {setting.cores}: {setting.threads} of the cores are used now"]
    return []


def _advice_reading(setting: Setting) -> list[str]:
    if setting.is_remote:
        return ["a larger --data.cache-gib, so that shards are fetched once, or a closer store"]
    return ["shards on a local or faster disk; the reading is one thread's and waits for it"]


def _advice_decoding(setting: Setting) -> list[str]:
    advice = _threads(setting)
    resize_px = round(RESIZE_MARGIN * setting.image_px)
    if setting.shorter_px > 1.2 * resize_px:
        advice.append(
            f"pack again with --resize {resize_px}: the shorter side is {setting.shorter_px:.0f} "
            f"px on average, decoding would cost about "
            f"{(resize_px / setting.shorter_px) ** 2:.0%} of it (small crops get less sharp)"
        )
    return advice or ["more cores for each process: pictures and threads are as they should be"]


def _advice_views(setting: Setting) -> list[str]:
    return _threads(setting) or ["more cores for each process, or a lower --data.image-px"]


def _advice_model(setting: Setting) -> list[str]:
    advice = []
    if setting.precision == "no" and setting.device == "cuda":
        advice.append("--precision bf16: the arithmetic is float32 now")
    return [*advice, "more or faster GPUs: the data path waits for the model"]


def unsteady(speeds: dict[str, Speed]) -> list[str]:
    """Names of what was measured with so much spread that the judgement is worth little."""
    return [name for name, speed in speeds.items() if speed.high > STEADY_RANGE * speed.low]


def figure(speed: float) -> str:
    """A speed, or another number from 0, with three digits that matter and without exponents."""
    if 0 < speed < LEAST_SHOWN:
        return f"below {LEAST_SHOWN}"
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"


def hours(images: float, images_per_second: float) -> float:
    """How long so many pictures take."""
    return images / images_per_second / 3600


def draw(speeds: dict[str, Speed], limit: str, title: str, picture: BinaryIO) -> None:
    """Draw the speeds as bars on a logarithmic axis, with the range of the rounds.

    Args:
        speeds: in the order from top to bottom; the first four are the parts.
        limit: the part that is slowest, in another colour.
        title: above.
        picture: open for writing, becomes a PNG.
    """
    names = list(speeds)
    medians = [speeds[name].median for name in names]
    below = [speeds[name].median - speeds[name].low for name in names]
    above = [speeds[name].high - speeds[name].median for name in names]
    colours = [
        "tab:red" if name == limit else "tab:blue" if name in names[: len(PARTS)] else "grey"
        for name in names
    ]
    chart, axis = plt.subplots(figsize=(8, 0.55 * len(names) + 1.4), layout="constrained")
    axis.barh(names, medians, xerr=[below, above], color=colours, capsize=3, height=0.65)
    for row, name in enumerate(names):
        note = f"  {figure(speeds[name].median)}"
        axis.annotate(note, (speeds[name].high, row), va="center", fontsize=9)
    axis.set_xscale("log")
    axis.set_xlim(min(medians) / 3, max(speed.high for speed in speeds.values()) * 4)
    axis.invert_yaxis()
    axis.set_xlabel("images/s (median and range of the rounds)")
    axis.set_title(title, fontsize=10)
    axis.grid(axis="x", alpha=0.3)
    chart.savefig(picture, format="png", dpi=120)
    plt.close(chart)
