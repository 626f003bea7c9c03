"""The page of a compressed model: bits and SNR by layer, sizes, distributions, tiles."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import median
from typing import Any

from torchcodec_weights.pages.chart import SIDE, Axis, axis_of, number, plot, spread
from torchcodec_weights.pages.document import document, escaped
from torchcodec_weights.system.terminal import printable

_FIRST_ROWS = 8
"""Rows of a long table that are open."""


@dataclass(frozen=True)
class Histogram:
    """How often weights lie in equal bins of ±limit.

    Attributes:
        limit: the end of the last bin.
        after: shares of the decoded weights, one for each bin.
        before: of the original ones; None if they are not known.
    """

    limit: float
    after: tuple[float, ...]
    before: tuple[float, ...] | None


@dataclass(frozen=True)
class Picture:
    """Samples of a tile as its codec decodes them, as PNG."""

    png: bytes
    caption: str


@dataclass(frozen=True)
class Layer:
    """An encoded weight.

    Attributes:
        name, shape, codec: as they are shown.
        bits_per_weight: everything counted.
        snr_db: infinite if nothing was lost.
        stored_bytes: of its bitstream and scales.
        facts: what else is to be said of it: names and values.
        histogram: None if it cannot be decoded here.
        picture: None if there is none, or the page would grow too large.
    """

    name: str
    shape: str
    codec: str
    bits_per_weight: float
    snr_db: float
    stored_bytes: int
    facts: tuple[tuple[str, str], ...]
    histogram: Histogram | None
    picture: Picture | None


@dataclass(frozen=True)
class Unencoded:
    """A tensor that is stored as it is."""

    name: str
    shape: str
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class Totals:
    """Of all encoded weights: bits per weight, bytes stored, dense, and resident beside them."""

    bits_per_weight: float
    stored_bytes: int
    dense_bytes: int
    resident_bytes: int


def model_page(layers: Sequence[Layer], others: Sequence[Unencoded], totals: Totals) -> str:
    """The page, as HTML."""
    other = sum(tensor.nbytes for tensor in others)
    body = [_head(layers, totals, other)]
    if layers:
        body += [_sizes(totals, other), _charts(layers)]
    body.append(_others(others, other))
    if layers:
        body.append(_table(layers))
    body.append(_foot())
    return document("Compression report", "\n".join(body), "model.js", _data(layers))


def size(nbytes: int) -> str:
    """Bytes in decimal units, three digits or more."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if nbytes >= unit:
            value = nbytes / unit
            return f"{value:.{2 if value < 10 else 1 if value < 1000 else 0}f} {name}"
    return f"{nbytes} B"


def _name(name: str) -> str:
    """A name that lines may break after its dots."""
    return escaped(name).replace(".", ".<wbr>")


def _decibel(value: float) -> str:
    return f"{value:.2f}".replace("-", "−") if isfinite(value) else "exact"


def _head(layers: Sequence[Layer], totals: Totals, other: int) -> str:
    codecs = ", ".join(dict.fromkeys(layer.codec for layer in layers))
    count = f"{len(layers):,} encoded weight{'' if len(layers) == 1 else 's'}"
    text = f"<h1>Compression report</h1>\n<p class=muted>{count}"
    if not layers:
        return f"{text}. Nothing of this model is encoded.</p>"
    finite = [layer.snr_db for layer in layers if isfinite(layer.snr_db)]
    snr = f"{median(finite):.1f} <span>dB</span>" if finite else "exact"
    dense, now = totals.dense_bytes + other, totals.stored_bytes + other
    figures = (
        ("bits per encoded weight", f"{totals.bits_per_weight:.3f}"),
        ("median SNR of the layers" if finite else "every weight as it was", snr),
        ("for the whole model", size(now)),
        ("smaller than dense", f"{dense / now:.2f} <span>times</span>"),
    )
    terms = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures)
    return f"{text}, {escaped(codecs)}</p>\n<dl class=figures>{terms}</dl>"


def _sizes(totals: Totals, other: int) -> str:
    parts = (
        ("Dense", (("dense", totals.dense_bytes), ("other", other))),
        ("On disk", (("coded", totals.stored_bytes), ("other", other))),
        (
            "In memory",
            (
                ("coded", totals.stored_bytes),
                ("resident", totals.resident_bytes),
                ("other", other),
            ),
        ),
    )
    longest = max(sum(nbytes for _, nbytes in row) for _, row in parts)
    lines = []
    for name, row in parts:
        bars = "".join(
            f'<i class={kind} style="width:{nbytes / longest:.3%}"></i>'
            for kind, nbytes in row
            if nbytes
        )
        total = sum(nbytes for _, nbytes in row)
        lines.append(
            f"<div><span class=name>{name}</span><span class=bar aria-hidden=true>{bars}</span>"
            f"<span class=number>{size(total)}</span></div>"
        )
    keys = [
        ("coded", "encoded", totals.stored_bytes),
        ("dense", "the same weights dense", totals.dense_bytes),
        ("resident", "resident beside the bits", totals.resident_bytes),
        ("other", "not encoded", other),
    ]
    items = "".join(
        f"<li><i class={kind}></i>{text}, {size(nbytes)}</li>"
        for kind, text, nbytes in keys
        if nbytes
    )
    return (
        "<section><h2>Sizes</h2>"
        f"<div class=sizes>{''.join(lines)}</div><ul class=key>{items}</ul></section>"
    )


def _charts(layers: Sequence[Layer]) -> str:
    width = SIDE / len(layers)
    bits = axis_of([layer.bits_per_weight for layer in layers], zero=True)
    bars = "".join(
        f'<a href="#w{index}" aria-label="{escaped(layer.name)}, {layer.bits_per_weight:.3f} bits '
        f'per weight, SNR {_spoken(layer.snr_db)}"><rect x="{index * width:.2f}" y="0" '
        f'width="{width:.2f}" height="{SIDE}"/>'
        f"{_bar(index * width, width, bits.place(layer.bits_per_weight))}</a>"
        for index, layer in enumerate(layers)
    )
    blocks = _blocks(layers)
    first = plot(f"<g class=bars>{bars}</g>", y=bits, y_ticks=4, kind="bars", x_labels=blocks)
    snr = axis_of([layer.snr_db for layer in layers])
    dots = "".join(
        f'<path class=dot d="M{(index + 0.5) * width:.2f} '
        f'{(1 - snr.place(layer.snr_db)) * SIDE:.1f}h0"/>'
        if isfinite(layer.snr_db)
        else "<path class=dot />"
        for index, layer in enumerate(layers)
    )
    second = plot(f"<g aria-hidden=true>{dots}</g>", y=snr, y_ticks=5, kind="bars", x_labels=blocks)
    below = ", numbered by block" if blocks else ""
    return f"""<section><h2>Layers</h2>
<p class=muted>In the order of the model{below}. Choose one to see it.</p>
<figure id=bits><figcaption>Bits per weight, everything counted</figcaption>{first}</figure>
<figure id=snr><figcaption>SNR in dB, weights over the error of what is computed with</figcaption>
{second}</figure>
<noscript><p class=muted>The distributions of weights are drawn by a script, which this browser does
not run. All numbers are in the table.</p></noscript>
<section class=layer id=layer hidden>
<header><h3 id=name aria-live=polite></h3>
<nav aria-label="Layers"><button id=previous aria-label="Previous layer">←\
</button> <button id=next aria-label="Next layer">→</button></nav></header>
<div class=columns>
<figure id=histogram><figcaption>Distribution of its weights</figcaption>
<div class=plot><svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" role=img \
aria-label="Histogram of the weights"></svg><div id=ends aria-hidden=true></div></div>
<ul class=key><li id=before><i class=line></i>before</li><li><i class=fill></i>after</li>\
<li id=missing>The original was not given.</li></ul></figure>
<p id=none class=muted>This weight cannot be decoded here.</p>
<dl class=facts id=facts></dl>
<figure class=picture id=picture><img alt=""><figcaption></figcaption></figure>
</div></section></section>"""


def _bar(left: float, width: float, height: float) -> str:
    return (
        f'<rect x="{left + 0.1 * width:.2f}" y="{(1 - height) * SIDE:.1f}" '
        f'width="{0.8 * width:.2f}" height="{height * SIDE:.1f}"/>'
    )


def _spoken(snr_db: float) -> str:
    return f"{_decibel(snr_db)} dB" if isfinite(snr_db) else "infinite"


def _blocks(layers: Sequence[Layer]) -> list[tuple[float, str]]:
    """Where the blocks of a model begin: the first number in the layers' names."""
    starts: list[tuple[float, str]] = []
    for index, layer in enumerate(layers):
        found = re.search(r"(?:^|\.)(\d{1,5})\.", layer.name)
        if found and (not starts or starts[-1][1] != found[1]):
            starts.append((index / len(layers), found[1]))
    return [starts[index] for index in spread([place for place, _ in starts], 0.09)]


def _table(layers: Sequence[Layer]) -> str:
    rows = "".join(
        f'<tr id="w{index}"><th scope=row><a href="#w{index}">{_name(layer.name)}</a>'
        f"<small>{escaped(layer.shape)} · {escaped(layer.codec)}</small></th>"
        f"<td>{layer.bits_per_weight:.3f}<td>{_decibel(layer.snr_db)}"
        f'<td class="nowrap">{size(layer.stored_bytes)}</tr>'
        for index, layer in enumerate(layers)
    )
    return (
        "<section><h2>All encoded weights</h2><table id=weights><thead><tr><th scope=col>weight"
        "<th scope=col>bits per weight<th scope=col>SNR, dB<th scope=col>stored</tr></thead>"
        f"<tbody>{rows}</tbody></table></section>"
    )


def _others(others: Sequence[Unencoded], nbytes: int) -> str:
    if not others:
        return "<section><h2>Not encoded</h2><p class=muted>Nothing.</p></section>"
    rows = [
        f"<tr><th scope=row>{_name(tensor.name)}<small>{escaped(tensor.shape)} · "
        f"{escaped(tensor.dtype)}</small></th><td class=nowrap>{size(tensor.nbytes)}</tr>"
        for tensor in sorted(others, key=lambda tensor: -tensor.nbytes)
    ]
    text = _other_table(rows[:_FIRST_ROWS])
    if rest := rows[_FIRST_ROWS:]:
        text += f"<details><summary>{len(rest):,} smaller ones</summary>{_other_table(rest)}"
        text += "</details>"
    count = f"{len(others):,} tensor{'' if len(others) == 1 else 's'}, {size(nbytes)}"
    return f"<section id=others><h2>Not encoded</h2><p class=muted>{count}</p>{text}</section>"


def _other_table(rows: Sequence[str]) -> str:
    return (
        "<table><thead><tr><th scope=col>tensor<th scope=col>stored</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _foot() -> str:
    return (
        "<footer class=muted><p>Bits per weight count everything that is stored: bitstream, "
        "tables, headers, scales. SNR is the energy of the weights over that of their error: 6 dB "
        "more are half the error. Sizes are of tensors; 1 MB is 1,000,000 bytes.</p>"
        "<p>Written by torchcodec_weights.</p></footer>"
    )


def _data(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """What the script draws, of each layer; heights are of 255."""
    rows = []
    for layer in layers:
        facts = [(name, printable(value)) for name, value in layer.facts]
        row: dict[str, Any] = {"name": printable(layer.name), "facts": facts}
        if layer.histogram is not None:
            row |= _drawn(layer.histogram)
        if layer.picture is not None:
            data = base64.b64encode(layer.picture.png).decode()
            row["picture"] = [f"data:image/png;base64,{data}", layer.picture.caption]
        rows.append(row)
    return rows


def _drawn(histogram: Histogram) -> dict[str, Any]:
    both = (histogram.after, histogram.before or ())
    highest = max((share for shares in both for share in shares), default=0.0) or 1.0
    after, before = ([round(255 * share / highest) for share in shares] for shares in both)
    axis = Axis(-histogram.limit, histogram.limit)
    ticks = [(round(axis.place(value), 4), number(value)) for value in axis.ticks(4)]
    return {"after": after, "before": before or None, "ticks": ticks}
