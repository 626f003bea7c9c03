"""Charts that fit any width: lines are stretched with the page, text keeps its size."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, isfinite, log10

from torchcodec_weights.pages.document import escaped

SIDE = 1000
"""Width and height of a chart's coordinates, whose origin is at the top left."""


@dataclass(frozen=True)
class Axis:
    """A range of values along one side of a chart.

    Attributes:
        low, high: its ends, low < high; both above 0 if it is logarithmic.
        log: whether it is.
    """

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """The value's place, 0 at the low end and 1 at the high one."""
        if self.log:
            return log10(value / self.low) / log10(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int) -> list[float]:
        """Round numbers within the range, at most about `most`."""
        if self.log:
            return self._log_ticks(most)
        raw = (self.high - self.low) / most
        unit = 10.0 ** floor(log10(raw))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * (1 - 1e-9))
        first, last = ceil(self.low / step - 1e-9), floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]

    def _log_ticks(self, most: int) -> list[float]:
        decades = range(floor(log10(self.low)), ceil(log10(self.high)) + 1)
        found: list[float] = []
        for digits in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
            numbers = [digit * 10.0**decade for decade in decades for digit in digits]
            found = [number for number in numbers if self.low <= number <= self.high]
            if len(found) <= most:
                break
        return found


def axis_of(values: Sequence[float], log: bool = False, zero: bool = False) -> Axis:
    """An axis that holds all values, with some room at its ends.

    Args:
        values: the finite ones count.
        log: whether it is logarithmic; the values are above 0 then.
        zero: whether it begins at 0.
    """
    finite = [value for value in values if isfinite(value)] or [1.0]
    low, high = min(finite), max(finite)
    if log:
        room = max(high / low, 1.2) ** 0.08
        return Axis(low / room, high * room, log=True)
    if zero:
        return Axis(0.0, high * 1.05 or 1.0)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 0.5
    return Axis(low - room, high + room)


def number(value: float) -> str:
    """A tick's number: as few digits as it has, thousands apart, a true minus sign."""
    text = f"{value:,.10f}".rstrip("0").rstrip(".") if abs(value) < 1e15 else f"{value:.3g}"
    return ("0" if text == "-0" else text).replace("-", "−")


def plot(
    svg: str,
    *,
    y: Axis,
    y_ticks: int,
    x_labels: Sequence[tuple[float, str]] = (),
    x_title: str = "",
    x_grid: bool = False,
    over: str = "",
    kind: str = "",
) -> str:
    """A chart: lines at the ticks of y, what is drawn, and labels.

    Args:
        svg: what is drawn, in coordinates of `SIDE`.
        y: the vertical axis, which goes up.
        y_ticks: about how many.
        x_labels: places from 0 to 1 and texts.
        x_title: text below them.
        x_grid: whether lines go up from them.
        over: HTML on top, placed in percent.
        kind: classes of the plot.
    """
    lines, labels = [], []
    for value in y.ticks(y_ticks):
        place = y.place(value)
        lines.append(_line(0, (1 - place) * SIDE, SIDE, (1 - place) * SIDE))
        labels.append(f'<span class="y" style="bottom:{place:.2%}">{number(value)}</span>')
    for place, text in x_labels:
        if x_grid:
            lines.append(_line(place * SIDE, 0, place * SIDE, SIDE))
        end = " first" if place < 0.02 else " last" if place > 0.98 else ""
        labels.append(f'<span class="x{end}" style="left:{place:.2%}">{escaped(text)}</span>')
    if x_title:
        labels.append(f'<span class="x title">{escaped(x_title)}</span>')
    return (
        f'<div class="plot {kind}"><svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none">'
        f'<g aria-hidden="true">{"".join(lines)}</g>{svg}</svg>'
        f'<div aria-hidden="true">{"".join(labels)}</div>{over}</div>'
    )


def polyline(points: Sequence[tuple[float, float]], x: Axis, y: Axis, kind: str) -> str:
    """A line through values (x, y)."""
    places = [f"{x.place(a) * SIDE:.1f} {(1 - y.place(b)) * SIDE:.1f}" for a, b in points]
    return f'<path class="{kind}" d="M{"L".join(places)}"/>'


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path class="grid" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>'


def spread(places: Sequence[float], gap: float) -> list[int]:
    """Indices of places that lie at least `gap` apart, the first included, evenly thinned out.

    Args:
        places: ascending.
    """
    for step in range(1, len(places) + 1):
        chosen = list(range(0, len(places), step))
        if all(places[b] - places[a] >= gap for a, b in pairwise(chosen)):
            return chosen
    return []
