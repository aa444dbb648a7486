"""A self-contained HTML page: text is escaped, pictures and curves are in it, nothing is loaded."""

import base64
import html
import io
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from PIL import Image

THUMBNAIL_PX = 112
CURVE_PX = (400, 200)
MARGINS_PX = (66, 12, 26, 24)  # left, right, top, bottom
MOST_POINTS = 400
STYLE = """
:root { color-scheme: light dark; --line: #8884; --mark: #fa03; --curve: #2a78d6; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1320px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0 0 .5rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p { margin: .2rem 0 .8rem; opacity: .8; }
dl { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 0; }
dt { font-size: .8rem; opacity: .7; } dd { margin: 0; font-size: 1.1rem; font-weight: 600; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; }
svg { background: #8881; border-radius: 6px; max-width: 100%; height: auto; }
svg text { font-size: 11px; fill: currentColor; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; }
td, th { text-align: left; padding: .15rem 1rem .15rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
tr.marked td { background: var(--mark); }
.sheet td, .sheet th { border: 0; padding: 0 .3rem .3rem 0; text-align: center; font-size: .75rem; }
.sheet td:first-child { padding-right: 1.2rem; } .sheet img { display: block; border-radius: 3px; }
@media (max-width: 600px) { .figures { gap: .6rem; } td, th { padding-right: .6rem; } }
.note { border-left: 3px solid #d80; margin-top: .8rem; padding-left: .6rem; }
"""


def shown(value: Any) -> str:
    """A value as people read it."""
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(shown(item) for item in value)
    return "-" if value is None else str(value)


def thumbnail(picture: Image.Image) -> str:
    """An ``img`` whose bytes are in the page, its longer side at most ``THUMBNAIL_PX``."""
    small = picture.convert("RGB")
    scale = THUMBNAIL_PX / max(small.size)
    size = (max(1, round(small.width * scale)), max(1, round(small.height * scale)))
    small = small.resize(size, Image.Resampling.BICUBIC if scale < 1 else Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img width="{size[0]}" height="{size[1]}" alt="" src="data:image/jpeg;base64,{data}">'


def curve_of(
    title: str,
    points: Sequence[tuple[float, float]],
    *,
    mark: float | None = None,
    is_share: bool = False,
) -> str:
    """An ``svg`` of a value over the steps, with its range and its last value.

    Args:
        title: of the value.
        points: steps and values.
        mark: a value at which a dashed line is drawn, within the range then.
        is_share: whether values are shown in per cent.
    """
    every = -(-len(points) // MOST_POINTS)
    kept = [p for p in [*points[:-1:every], points[-1]] if math.isfinite(p[1])]
    if not kept:
        return ""
    (width, height), (left, right, top, bottom) = CURVE_PX, MARGINS_PX
    xs, ys = zip(*kept, strict=True)
    x_low, x_span = min(xs), (max(xs) - min(xs)) or 1
    reach = ys if mark is None else (*ys, mark)
    y_low, y_span = min(reach), (max(reach) - min(reach)) or 1

    def height_of(y: float) -> str:
        return f"{height - bottom - (y - y_low) / y_span * (height - top - bottom):.1f}"

    def value(y: float) -> str:
        return f"{y:.2%}" if is_share else shown(float(y))

    places = " ".join(
        f"{left + (x - x_low) / x_span * (width - left - right):.1f},{height_of(y)}"
        for x, y in kept
    )
    end_x, end_y = places.split()[-1].split(",")
    line = ""
    if mark is not None:
        line = (
            f'<line x1="{left}" x2="{width - right}" y1="{height_of(mark)}" y2="{height_of(mark)}"'
            ' stroke="currentColor" stroke-dasharray="4 4" opacity=".5"/>'
        )
    texts = [
        (left, 16, "start", f"{title}: {value(ys[-1])}"),
        (left - 5, top + 8, "end", value(max(reach))),
        (left - 5, height - bottom, "end", value(min(reach))),
        (left, height - 8, "start", f"step {x_low:,}"),
        (width - right, height - 8, "end", f"{max(xs):,}"),
    ]
    labels = "".join(
        f'<text x="{x}" y="{y}" text-anchor="{anchor}">{html.escape(text)}</text>'
        for x, y, anchor, text in texts
    )
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">'
        f"{labels}{line}"
        f'<polyline points="{places}" fill="none" stroke="var(--curve)" stroke-width="1.6"/>'
        f'<circle cx="{end_x}" cy="{end_y}" r="3" fill="var(--curve)"/></svg>'
    )


class Page:
    """Collects the parts of a page, in order."""

    def __init__(self, title: str) -> None:
        self._title = html.escape(title)
        self._parts = [f"<h1>{self._title}</h1>"]

    def heading(self, title: str, text: str = "") -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{html.escape(title)}</h2>")
        if text:
            self._parts.append(f"<p>{html.escape(text)}</p>")

    def note(self, text: str) -> None:
        """What a reader must not miss."""
        self._parts.append(f'<p class="note">{html.escape(text)}</p>')

    def facts(self, facts: dict[str, str]) -> None:
        """Large figures with their names."""
        pairs = "".join(
            f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
            for name, value in facts.items()
        )
        self._parts.append(f"<dl>{pairs}</dl>")

    def figures(self, drawings: Iterable[str]) -> None:
        """Curves side by side."""
        self._parts.append(f'<div class="figures">{"".join(drawings)}</div>')

    def table(
        self,
        names: Sequence[str],
        rows: Iterable[Sequence[str]],
        marked: Collection[int] = (),
    ) -> None:
        """Rows of text; ``marked`` ones stand out."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
        body = "".join(
            f'<tr class="{"marked" if number in marked else ""}">'
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
            + "</tr>"
            for number, row in enumerate(rows)
        )
        self._parts.append(f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>')

    def sheet(
        self,
        names: Sequence[str],
        rows: Sequence[Sequence[Image.Image]],
        captions: Sequence[Sequence[str]] | None = None,
    ) -> None:
        """Rows of pictures."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
        body = ""
        for number, row in enumerate(rows):
            texts = captions[number] if captions else [""] * len(row)
            cells = zip(row, texts, strict=True)
            body += "".join(f"<td>{thumbnail(p)}{html.escape(text)}</td>" for p, text in cells)
            body = f"{body}</tr><tr>"
        self._parts.append(
            f'<div class="wide"><table class="sheet"><tr>{head}</tr><tr>{body}</tr></table></div>'
        )

    def html(self) -> str:
        """The page."""
        head = (
            '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{self._title}</title><style>{STYLE}</style>"
        )
        body = "".join(self._parts)
        return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'
