"""A report as one HTML file: the timeline by kind, readable offline, by keyboard and in words.

The file asks nobody for anything: its style and its script stand in it, and its content security
policy allows these two alone, by their hashes. Whatever comes from the program is text.
"""

import base64
import hashlib
import html
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from every_byte.files import check_writable, written
from every_byte.kinds import ALL_KINDS
from every_byte.report import PHASES, Report, step_of
from every_byte.tracker import Breakdown, Timeline
from every_byte.units import grouped, short, unit
from every_byte.watch import Place

_MARK = '<meta name="generator" content="every-byte run">'
_KIND = "a report of every-byte run"
_POINTS = 500  # of the timeline; of those that fall together the largest is kept
_ROWS = 60  # of the table of phases
_WIDTH, _HEIGHT, _LEFT, _TOP = 960, 320, 116, 16
_FOLDER = Path(__file__).parent / "data"


def check(path: Path, force: bool = False) -> None:
    """Refuse a path that the report could not be written to, as `every_byte.files` says.

    Raises:
        OSError: it cannot be written, or a file of another kind is there without `force`.
    """
    check_writable(path, _KIND, _is_report, force)


def write(path: Path, report: Report, timeline: Timeline, script: str, force: bool = False) -> None:
    """Write the page beside its place, and move it there once it is whole.

    Raises:
        OSError: see `check`.
    """
    with written(path, _KIND, _is_report, force, mode="w") as file:
        file.write(page(report, timeline, script))


def _is_report(head: bytes) -> bool:
    return _MARK.encode() in head


def page(report: Report, timeline: Timeline, script: str) -> str:
    """The page.

    Args:
        script: its name, for the heading.
    """
    style = (_FOLDER / "report.css").read_text("utf-8")
    code = (_FOLDER / "report.js").read_text("utf-8")
    policy = (
        f"default-src 'none'; script-src '{_hash(code)}'; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    title = html.escape(f"{script} on the {report.card}: GPU memory")
    points = _points(timeline)
    verdict, *more = report.lines()
    body = "\n".join(
        (
            f"<h1>{html.escape(script)} on the {html.escape(report.card)}</h1>",
            f'<p class="verdict {"fits" if report.fits else "not"}">{html.escape(verdict)}</p>',
            _figure(report, points) if points else "",
            _kinds(report),
            _phases(report),
            _levers(report),
            "<h2>The report in words</h2>",
            f"<pre>{html.escape(chr(10).join([verdict, *more]))}</pre>",
        )
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{_MARK}
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
<script>{code}</script>
</body>
</html>
"""


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _points(timeline: Timeline) -> list[tuple[Place, Breakdown]]:
    """The timeline, in so many points that a page can show; the peak is among them."""
    pairs = list(zip(timeline.where, timeline.steps, strict=True))
    place = timeline.highest_where
    stretch = max(1, -(-len(pairs) // _POINTS))
    found: list[tuple[Place, Breakdown]] = []
    for start in range(0, len(pairs), stretch):
        end = min(start + stretch, len(pairs))
        if place is not None and start < max(timeline.highest_at, 1) <= end:
            found.append((place, timeline.highest))
        found.append(max(pairs[start:end], key=lambda pair: pair[1].total))
    return found


def _figure(report: Report, points: list[tuple[Place, Breakdown]]) -> str:
    totals = [step.total for _, step in points]
    peak = max(range(len(points)), key=lambda i: totals[i])
    shows_card = report.capacity <= 4 * max(totals[peak], 1)
    top = 1.08 * max(totals[peak], report.capacity if shows_card else 0, 1)
    inner_width, inner_height = _WIDTH - _LEFT - 8, _HEIGHT - _TOP - 24

    def x(index: int) -> float:
        return round(_LEFT + inner_width * index / max(len(points) - 1, 1), 1)

    def y(nbytes: float) -> float:
        return round(_TOP + inner_height * (1 - nbytes / top), 1)

    kinds = [k for k in ALL_KINDS if any(step.get(k.name) for _, step in points)]
    parts = []
    floor = [0] * len(points)
    for kind in kinds:
        ceiling = [low + step.get(kind.name, 0) for low, (_, step) in zip(floor, points)]  # noqa: B905
        edge = [f"{x(i)},{y(n)}" for i, n in enumerate(ceiling)]
        edge += [f"{x(i)},{y(n)}" for i, n in reversed(list(enumerate(floor)))]
        corners, name = " ".join(edge), html.escape(kind.name)
        parts.append(
            f'<polygon points="{corners}" fill="{kind.color}"><title>{name}</title></polygon>'
        )
        floor = ceiling
    one, of = unit(round(top / 1.08))
    for share in range(5):
        n = top / 1.08 * share / 4
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y(n)}" y2="{y(n)}"/>'
            f'<text x="{_LEFT - 6}" y="{y(n) + 4}" text-anchor="end">{n / one:.3g} {of}</text>'
        )
    if shows_card:
        at = y(report.capacity)
        parts.append(
            f'<line class="card" x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{at}" y2="{at}"/>'
            f'<text x="{_LEFT + 4}" y="{at + 14}">{html.escape(report.card)}: '
            f"{short(report.capacity)}</text>"
        )
    steps = [step_of(place, len(report.after_step)) for place, _ in points]
    for i in range(1, len(points)):
        if steps[i] != steps[i - 1]:
            parts.append(
                f'<line class="step" x1="{x(i)}" x2="{x(i)}" y1="{_TOP}" '
                f'y2="{_TOP + inner_height}"/><text x="{x(i) + 3}" y="{_HEIGHT - 6}">'
                f"step {steps[i]}</text>"
            )
    parts.append(
        f'<circle class="peak" cx="{x(peak)}" cy="{y(totals[peak])}" r="5"/>'
        f'<line class="cursor" x1="{x(peak)}" x2="{x(peak)}" y1="{_TOP}" '
        f'y2="{_TOP + inner_height}"/>'
    )
    words = (
        f"Allocated memory by kind, operation by operation. It peaks at {short(totals[peak])} "
        f"{PHASES[points[peak][0].phase]}, at {points[peak][0]}. The tables below say the same."
    )
    data = {
        "left": _LEFT,
        "width": inner_width,
        "kinds": [kind.name for kind in kinds],
        "places": _interned(points, len(report.after_step)),
        "phases": PHASES,
        "at": peak,
    }
    # No "<" can end the element that the data stand in.
    encoded = json.dumps(data).replace("<", "\\u003c")
    beyond = "" if shows_card else f" The card's {short(report.capacity)} lie far above."
    legend = "".join(
        f'<li><svg width="12" height="12" aria-hidden="true"><rect width="12" height="12" '
        f'fill="{kind.color}"/></svg> {html.escape(kind.name)}</li>'
        for kind in kinds
    )
    return f"""<h2>Memory over time</h2>
<figure>
<div class="chart" tabindex="0" role="slider" aria-label="Point of the timeline"
 aria-valuemin="0" aria-valuemax="{len(points) - 1}" aria-valuenow="{peak}"
 aria-valuetext="{short(totals[peak])}" aria-describedby="caption">
<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(words)}">
{"".join(parts)}
</svg>
</div>
<ul class="legend">{legend}</ul>
<div class="readout"><p class="where">&nbsp;</p><pre class="source">&nbsp;</pre>
<p class="held">&nbsp;</p></div>
<figcaption id="caption">{html.escape(words)}{html.escape(beyond)} Point at the figure, or
use the arrow keys, Home and End on it: the box shows the line of your script and what was held.
</figcaption>
</figure>
<script type="application/json" id="timeline">{encoded}</script>"""


def _interned(points: list[tuple[Place, Breakdown]], taken: int) -> dict[str, Any]:
    """Points for the page's script: places once each, and the bytes of each kind."""
    places = list(dict.fromkeys(place for place, _ in points))
    number = {place: i for i, place in enumerate(places)}
    names = [k.name for k in ALL_KINDS if any(step.get(k.name) for _, step in points)]
    return {
        "known": [
            [step_of(place, taken), place.phase, str(place), place.source] for place in places
        ],
        "of": [number[place] for place, _ in points],
        "bytes": [[step.get(name, 0) for name in names] for _, step in points],
    }


def _table(
    head: tuple[str, ...], rows: Iterable[tuple[str | int | None, ...]], numbers: set[int]
) -> str:
    """A table whose integers are bytes: in three digits, and exact in a copy that is folded."""
    rows = list(rows)

    def written(bytes_as: Callable[[int], str]) -> str:
        def cells(tag: str, row: tuple[str | int | None, ...]) -> str:
            return "".join(
                f"<{tag}{' class=number' if i in numbers else ''}>{html.escape(cell)}</{tag}>"
                for i, value in enumerate(row)
                for cell in (bytes_as(value) if isinstance(value, int) else value or "",)
            )

        body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
        return (
            f'<div class="scroll" tabindex="0"><table><thead><tr>{cells("th", head)}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )

    exact = written(lambda n: f"{grouped(n)} B")
    return f"{written(short)}<details><summary>Exact bytes</summary>{exact}</details>"


def _kinds(report: Report) -> str:
    if not report.by_kind:
        return ""
    rows = sorted(report.by_kind.items(), key=lambda item: -item[1])
    where = f"{PHASES[report.phase]}, at {report.line}"
    return (
        f"<h2>What held the peak</h2><p>{html.escape(where)}: "
        f"<code>{html.escape(report.source)}</code></p>"
        + _table(
            ("kind", "held", "share"),
            ((kind, n, f"{n / report.peak:.1%}") for kind, n in rows),
            {1, 2},
        )
    )


def _phases(report: Report) -> str:
    shown = report.phases[:_ROWS]
    left = len(report.phases) - len(shown)
    more = f"<p>And {left} more.</p>" if left > 0 else ""
    return (
        "<h2>The peak of each phase</h2>"
        + _table(
            ("step", "phase", "largest", "at"),
            ((str(p.step), p.phase, p.peak, p.line) for p in shown),
            {0, 2},
        )
        + more
    )


def _levers(report: Report) -> str:
    if not report.levers:
        return ""

    rows = (
        (saving.change, "yes" if saving.fits else "no", saving.saved, saving.saved_reserved)
        for saving in report.levers
    )
    head = ("change", "fits", "saved of allocated", "of reserved")
    return "<h2>What would help</h2>" + _table(head, rows, {2, 3})
