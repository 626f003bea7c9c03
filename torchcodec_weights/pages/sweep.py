"""The page of a sweep: rate against quality, a chart for each model and metric."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import log10
from operator import attrgetter

from torchcodec_weights.pages.chart import Axis, axis_of, number, plot, polyline, spread
from torchcodec_weights.pages.document import document, escaped

_COLORS, _SHAPES = 6, 4
_DB_PER_BIT = 20 * log10(2)
"""Of Shannon's rate–distortion function for Gaussian weights."""


@dataclass(frozen=True)
class Point:
    """A measured setting.

    Attributes:
        model: its name.
        curve: codec and preset; settings of one curve differ in bits.
        metric: name of what `value` is.
        bits: per weight, everything counted.
        value: of the metric.
        snr_db: of the weights; None if nothing was lost.
        reference: whether it is a line to compare with, as the dense model, or lossless; not a
            point of a curve.
        lower_is_better: whether lower values are; they are drawn on a logarithmic axis.
        remarks: what else is to be said of it.
    """

    model: str
    curve: str
    metric: str
    bits: float
    value: float
    snr_db: float | None
    reference: bool
    lower_is_better: bool
    remarks: tuple[str, ...]


def sweep_page(points: Sequence[Point], errors: Sequence[tuple[str, str]]) -> str:
    """The page, as HTML.

    Args:
        points: measured settings.
        errors: names of settings that were not reached, and why.
    """
    body = [
        "<h1>Rate against quality</h1>",
        "<p class=muted>Bits per weight count everything that is stored. Point at a mark, "
        "touch it or go to it with the Tab key, to read it.</p>",
    ]
    for _, model in groupby(sorted(points, key=attrgetter("model")), attrgetter("model")):
        body += _model(list(model))
    if not points:
        body.append("<p>Nothing was measured.</p>")
    if errors:
        items = "".join(f"<li>{escaped(name)}: {escaped(text)}</li>" for name, text in errors)
        body.append(f"<section><h2>Not reached</h2><ul class=muted>{items}</ul></section>")
    body.append("<footer class=muted><p>Written by torchcodec_weights.</p></footer>")
    return document("Rate against quality", "\n".join(body))


def _model(points: list[Point]) -> list[str]:
    name = escaped(points[0].model)
    styles = {
        curve: f"c{index % _COLORS} s{index // _COLORS % _SHAPES}"
        for index, curve in enumerate(
            dict.fromkeys(point.curve for point in points if not point.reference)
        )
    }
    keys = "".join(
        f'<li class="{style.split()[0]}"><i class="shape {style.split()[1]}"></i>'
        f"<span class=muted>{escaped(curve)}</span></li>"
        for curve, style in styles.items()
    )
    parts = [f"<section><h2>{name}</h2><ul class=key>{keys}</ul>"]
    metrics = list(dict.fromkeys(point.metric for point in points))
    for metric in metrics:
        mine = [point for point in points if point.metric == metric]
        log = mine[0].lower_is_better
        values = [point.value for point in mine]
        caption = f"{metric}{', logarithmic; lower is better' if log else '; higher is better'}"
        parts.append(_chart(mine, values, caption, styles, log))
    mine = [point for point in points if point.metric == metrics[0] and point.snr_db is not None]
    mine = [point for point in mine if not point.reference]
    if mine:
        snr = [point.snr_db or 0.0 for point in mine]
        caption = (
            "SNR of the weights in dB; higher is better. Dashed: Shannon’s limit, Gaussian weights"
        )
        parts.append(_chart(mine, snr, caption, styles, log=False, bound=True))
    return [*parts, _table(points), "</section>"]


def _chart(
    points: list[Point],
    values: list[float],
    caption: str,
    styles: dict[str, str],
    log: bool,
    bound: bool = False,
) -> str:
    rates = [point.bits for point in points if not point.reference]
    x = axis_of(rates)
    y = axis_of([*values, *([_DB_PER_BIT * max(rates)] if bound else [])], log and min(values) > 0)
    curves: dict[str, list[tuple[float, float]]] = {}
    marks, lines = [], []
    references: dict[float, list[str]] = {}
    for point, value in zip(points, values, strict=True):
        if point.reference:
            references.setdefault(value, []).append(point.curve)
        else:
            curves.setdefault(point.curve, []).append((point.bits, value))
            marks.append(_mark(point, x.place(point.bits), y.place(value), styles[point.curve]))
    lines += [polyline([(x.low, value), (x.high, value)], x, y, "bound") for value in references]
    if bound:
        lines.append(_shannon(x, y))
    lines += [
        polyline(sorted(curve), x, y, f"curve {styles[name].split()[0]}")
        for name, curve in curves.items()
    ]
    ticks = x.ticks(6)
    places = [x.place(value) for value in ticks]
    labels = [(places[index], number(ticks[index])) for index in spread(places, 0.07)]
    notes = "".join(
        f'<span class=note style="bottom:calc({y.place(value):.2%} + 0.3rem)">'
        f"{escaped(', '.join(names))}</span>"
        for value, names in references.items()
    )
    drawn = plot(
        "".join(lines),
        y=y,
        y_ticks=7,
        x_labels=labels,
        x_title="bits per weight",
        x_grid=True,
        over=notes + "".join(marks),
        kind="tall",
    )
    return f"<figure><figcaption>{escaped(caption)}</figcaption>{drawn}</figure>"


def _shannon(x: Axis, y: Axis) -> str:
    low = max(x.low, y.low / _DB_PER_BIT)
    return polyline([(low, _DB_PER_BIT * low), (x.high, _DB_PER_BIT * x.high)], x, y, "bound")


def _mark(point: Point, left: float, up: float, style: str) -> str:
    texts = [f"{point.bits:.3f} bits per weight", f"{point.metric} {point.value:.2f}"]
    if point.snr_db is not None:
        texts.append(f"SNR {point.snr_db:.2f} dB")
    texts += point.remarks
    side = "right" if left < 0.5 else "left"
    if up > 0.55:
        side += " below"
    lines = "<br>".join(map(escaped, texts))
    return (
        f'<button class="point {style}" style="left:{left:.2%};bottom:{up:.2%}">'
        f'<span class="tip {side}"><b>{escaped(point.curve)}</b>{lines}</span></button>'
    )


def _table(points: list[Point]) -> str:
    rows = "".join(
        f"<tr><th scope=row>{escaped(point.curve)}<small>{escaped(point.metric)}</small></th>"
        f"<td>{point.bits:.3f}<td>{point.value:,.2f}"
        f"<td>{'exact' if point.snr_db is None else f'{point.snr_db:.2f}'}"
        f'<td class="wide">{"<br>".join(map(escaped, point.remarks))}</tr>'
        for point in points
    )
    return (
        "<details><summary>All values</summary><table><thead><tr><th scope=col>codec (preset)"
        "<th scope=col>bits per weight<th scope=col>value<th scope=col>SNR, dB"
        f'<th scope=col class="wide">speed</tr></thead><tbody>{rows}</tbody></table></details>'
    )
