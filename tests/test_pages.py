"""Pages: what they say is what was measured, names cannot become markup, a browser shows them."""

import copy
import html
import io
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import chromium
import numpy as np
import pytest
import torch
from conftest import coded
from PIL import Image
from torch import Tensor, nn

from torchcodec_weights import (
    CodecError,
    CodecTensor,
    Report,
    codec_weight_only,
    compression_report,
    quantize_,
    resident,
)
from torchcodec_weights.codecs.pictures import SampleCodec
from torchcodec_weights.codecs.registry import get_codec
from torchcodec_weights.format.container import read_tile
from torchcodec_weights.matrix.opened import as_array
from torchcodec_weights.models.distribution import histogram, picture
from torchcodec_weights.models.report import report_tensors
from torchcodec_weights.pages.chart import Axis, axis_of, number
from torchcodec_weights.pages.model import size
from torchcodec_weights.pages.png import png
from torchcodec_weights.pages.sweep import Point, sweep_page

HOSTILE = "a.0.</script><img src=x onerror=\"document.title='owned'\">'&\x1b\u202e"
VOID = ("meta", "img", "br", "wbr", "path")


class Page(HTMLParser):
    """Elements and texts of a page; fails where elements are closed that were not opened."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.data = ""
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            if tag in ("td", "th") and self.open[-1] in ("td", "th"):
                self.open.pop()  # HTML lets a cell begin where one is open
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag == "tr" and self.open[-1] in ("td", "th"):
            self.open.pop()
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
        if self.elements and self.elements[-1] == (
            "script",
            {"type": "application/json", "id": "data"},
        ):
            self.data += data


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Ten layers, one of them in a codec of pictures, kept as int8 in part; not encoded: biases."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(128, 192) for _ in range(10)))


@pytest.fixture(scope="module")
def report(model: nn.Module) -> Report:
    small = copy.deepcopy(model)
    quantize_(small[0], codec_weight_only("h264", bits=3))
    quantize_(small[1:], codec_weight_only("ectcq", bits=2, preset="fast"))
    resident(small[1], "int8")
    return compression_report(small)


@pytest.fixture(scope="module")
def page(report: Report, model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "report.html"
    report.to_html(path, original=model)
    return path


def test_the_page_has_the_numbers_of_the_report(report: Report, page: Path) -> None:
    parsed = Page(page)
    rows = {row[0]: row for row in parsed.rows}
    for weight in report.weights:
        name = f"{weight.name}{weight.shape[0]} × {weight.shape[1]} · {weight.codec}"
        _, bits, snr, stored = rows[name]
        assert bits == f"{weight.bits_per_weight:.3f}"
        assert snr == f"{weight.used_snr_db:.2f}"
        assert stored == size(weight.stored_bytes)
    assert rows["0.bias192 · float32"][1] == "768 B"
    facts = [dict(layer["facts"]) for layer in json.loads(parsed.data)]
    assert facts[0]["decoder"] == report.weights[0].decoder
    assert facts[1]["resident"] == f"int8, {size(report.weights[1].resident_bytes)}"
    assert "resident" not in facts[2]
    assert f"<dd>{report.bits_per_weight:.3f}</dd>" in parsed.text
    dense, now = report.dense_bytes + report.other_bytes, report.stored_bytes + report.other_bytes
    assert f"<dd>{dense / now:.2f} <span>times" in parsed.text
    assert size(now + report.resident_bytes) in parsed.text
    assert [path.name for path in page.parent.iterdir()] == ["report.html"]


def test_one_file_and_no_network(page: Path) -> None:
    parsed = Page(page)
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", parsed.text)
    for tag, attributes in parsed.elements:
        assert tag not in ("link", "iframe", "object", "base", "form")
        assert not attributes.get("src")
        assert not any(name.startswith("on") for name in attributes)
        href = attributes.get("href") or ""
        assert not href or href[1:] in {e.get("id") for _, e in parsed.elements}
    identifiers = [e["id"] for _, e in parsed.elements if "id" in e]
    assert len(identifiers) == len(set(identifiers))
    assert page.stat().st_size < 250_000


def test_names_cannot_become_markup(coded_query: CodecTensor, tmp_path: Path) -> None:
    hostile = report_tensors([(HOSTILE, coded_query), (f"{HOSTILE}2", torch.ones(3))])
    hostile.to_html(tmp_path / "page.html")
    parsed = Page(tmp_path / "page.html")
    assert [tag for tag, _ in parsed.elements].count("script") == 2
    assert [e for tag, e in parsed.elements if tag == "img"] == [{"alt": ""}]
    assert "\x1b" not in parsed.text
    assert "\u202e" not in parsed.text
    shown = HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    assert {row[0].split("384")[0] for row in parsed.rows if shown in row[0]} >= {shown}
    assert json.loads(parsed.data)[0]["name"] == shown
    point = Point(HOSTILE, HOSTILE, HOSTILE, 2.0, 3.0, 1.0, False, True, (HOSTILE,))
    (tmp_path / "sweep.html").write_text(sweep_page([point], [(HOSTILE, HOSTILE)]))
    assert not [tag for tag, _ in Page(tmp_path / "sweep.html").elements if tag == "img"]
    assert html.escape(shown) in (tmp_path / "sweep.html").read_text()


def test_histograms(query: Tensor, coded_query: CodecTensor) -> None:
    shown = histogram(coded_query, query)
    assert shown.limit == pytest.approx(4 * float(query.double().square().mean().sqrt()))
    edges = np.linspace(-shown.limit, shown.limit, len(shown.after) + 1)
    assert shown.before is not None
    for shares, weight in ((shown.after, coded_query.dequantize()), (shown.before, query)):
        values = weight.double().flatten().numpy()
        expected = [np.mean((a <= values) & (values < b)) for a, b in pairwise(edges)]
        np.testing.assert_allclose(shares, expected, atol=1e-4)
    assert histogram(coded_query, None).before is None


def test_pictures(query: Tensor, coded_query: CodecTensor) -> None:
    codec = get_codec("h264")
    assert isinstance(codec, SampleCodec)
    payload, _ = read_tile(as_array(coded_query.qdata).data, coded_query.header, 0)
    frame, depth = codec.decode_frame(payload)
    samples = frame[:128, :128].astype(float) - 2 ** (depth - 1)
    shown = picture(coded_query)
    assert shown is not None
    gray = np.asarray(Image.open(io.BytesIO(shown.png)), dtype=float)
    scale = 127 / (4 * np.sqrt(np.mean(samples**2)))
    np.testing.assert_allclose(gray, np.clip(samples * scale + 128, 0, 255), atol=0.51)
    assert f"{len(payload):,} bytes" in shown.caption
    assert picture(coded(query, "ectcq")) is None


def test_png() -> None:
    gray = np.random.default_rng(0).integers(0, 256, (5, 7)).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png(gray)))), gray)


def test_the_wrong_original(report: Report, model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    with pytest.raises(ValueError, match=r"0\.weight is not there"):
        report.to_html(path, original={})
    with pytest.raises(ValueError, match=r"0\.weight is in the shape \(2, 3\).*\(192, 128\)"):
        report.to_html(path, original={"0.weight": torch.ones(2, 3)})
    with pytest.raises(ValueError, match="original=3"):
        report.to_html(path, original=3)
    assert not path.exists()


def test_a_corrupt_weight_is_named(query: Tensor, tmp_path: Path) -> None:
    weight = CodecTensor.from_hp(query, codec_weight_only("ectcq", bits=2, preset="fast"))
    weight.qdata[-1] ^= 1
    with pytest.raises(CodecError, match=r"layer\.weight: "):
        report_tensors([("layer.weight", weight)]).to_html(tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_nothing_encoded_and_nothing_lost(query: Tensor, tmp_path: Path) -> None:
    compression_report(nn.Linear(3, 3)).to_html(tmp_path / "page.html")
    assert "Nothing of this model is encoded" in Page(tmp_path / "page.html").text
    exact = CodecTensor.from_hp(query, codec_weight_only("lossless"))
    report_tensors([("w", exact)]).to_html(tmp_path / "page.html", {"w": query})
    parsed = Page(tmp_path / "page.html")
    assert parsed.rows[1][2] == "exact"
    layer = json.loads(parsed.data)[0]
    assert layer["before"] == layer["after"]


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis(0, 3.2), [0, 1, 2, 3]),
        (Axis(-0.31, 0.31), [-0.2, 0, 0.2]),
        (Axis(20, 400, log=True), [20, 50, 100, 200]),
        (axis_of([], zero=True), [0, 0.5, 1]),
    ],
)
def test_ticks(axis: Axis, ticks: list[float]) -> None:
    assert axis.ticks(4) == pytest.approx(ticks)
    assert all(0 <= axis.place(value) <= 1 for value in ticks)


def test_numbers() -> None:
    assert [number(value) for value in (-0.2, 0.30000000000000004, 2000.0, -0.0)] == [
        *("−0.2", "0.3", "2,000", "0")
    ]
    assert [size(value) for value in (512, 6120, 56_700_000)] == ["512 B", "6.12 kB", "56.7 MB"]


def measured() -> list[Point]:
    rows = [
        Point("m", codec, "perplexity", bits, 20 + 2 ** (8 - bits) * (1 + place), 6 * bits - place,
              False, True, ("decode 3.0 Mweights/s",))
        for place, codec in enumerate(("ectcq (best)", "h264 (medium)"))
        for bits in (2.0, 3.0, 4.0)
    ]  # fmt: skip
    return [Point("m", "dense", "perplexity", 32.0, 20.0, None, True, True, ()), *rows]


def test_the_page_of_a_sweep(tmp_path: Path) -> None:
    path = tmp_path / "sweep.html"
    path.write_text(sweep_page(measured(), [("m vvc 0.1", "cannot be reached")]))
    parsed = Page(path)
    assert "m vvc 0.1: cannot be reached" in parsed.text
    marks = [e for tag, e in parsed.elements if tag == "button"]
    assert len(marks) == 12  # two charts
    up = [float(re.search(r"bottom:([\d.]+)%", mark["style"] or "")[1]) for mark in marks]
    assert up[0] > up[1] > up[2]  # perplexity falls
    assert up[6] < up[7] < up[8]  # SNR rises
    assert "script-src 'none'" in parsed.text
    assert not [tag for tag, _ in parsed.elements if tag == "script"]


needs_chromium = pytest.mark.skipif(chromium.PROGRAM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[chromium.Chromium]:
    with chromium.Chromium() as found:
        yield found


@needs_chromium
def test_a_layer_is_clicked(browser: chromium.Chromium, report: Report, page: Path) -> None:
    browser.open(page, 1100, 900)
    name = "document.getElementById('name').textContent"
    shown = (
        "document.getElementById('histogram').querySelectorAll('path.after, path.before').length"
    )
    assert browser.value(name) == "0.weight"
    assert browser.value(shown) == 2
    assert browser.value("document.querySelector('#picture img').naturalWidth") == 128
    browser.click("#bits .bars a:nth-of-type(8)")
    assert browser.value(name) == "7.weight"
    assert browser.value("document.querySelector('#weights .selected a').textContent") == "7.weight"
    facts = browser.value("document.getElementById('facts').innerText")
    assert f"{report.weights[7].snr_db:.2f} dB" in facts
    assert browser.value("document.getElementById('picture').hidden")
    browser.press("ArrowLeft")
    assert browser.value(name) == "6.weight"
    assert browser.value("document.activeElement.getAttribute('href')") == "#w6"
    browser.click("#next")
    browser.click("#next")
    assert browser.value(name) == "8.weight"
    browser.click("#w2 a")
    assert browser.value(name) == "2.weight"
    assert not browser.messages
    assert set(browser.requests) == {page.resolve().as_uri()} | {
        url for url in browser.requests if url.startswith("data:image/png")
    }


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_readable_on_a_phone(
    browser: chromium.Chromium, page: Path, tmp_path: Path, dark: bool
) -> None:
    sweep = tmp_path / "sweep.html"
    sweep.write_text(sweep_page(measured(), []))
    for path in (page, sweep):
        browser.open(path, 360, 740, dark=dark)
        assert browser.value("document.documentElement.scrollWidth") == 360
        smallest = browser.value(
            "Math.min(...[...document.querySelectorAll('main *')].filter(e => e.innerText)"
            ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
        )
        assert smallest >= 12
        assert contrast(browser) >= 4.5


def contrast(browser: chromium.Chromium) -> float:
    """Of muted text with what lies behind the page (WCAG 2.2)."""
    colors = browser.value(
        "[getComputedStyle(document.querySelector('.muted')).color,"
        "getComputedStyle(document.body).backgroundColor]"
    )
    lights = []
    for color in colors:
        parts = np.array([int(part) / 255 for part in re.findall(r"\d+", color)[:3]])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        lights.append(float(linear @ [0.2126, 0.7152, 0.0722]) + 0.05)
    return max(lights) / min(lights)


@needs_chromium
def test_hover_shows_a_point(browser: chromium.Chromium, tmp_path: Path) -> None:
    path = tmp_path / "sweep.html"
    path.write_text(sweep_page(measured(), []))
    browser.open(path, 360, 740)
    tips = (
        "[...document.querySelectorAll('.tip')].filter(e => e.offsetParent).map(e => e.innerText)"
    )
    assert browser.value(tips) == []
    browser.move(".point:nth-of-type(6)")
    (tip,) = browser.value(tips)
    assert tip.splitlines() == [
        *("h264 (medium)", "4.000 bits per weight", "perplexity 52.00", "SNR 23.00 dB"),
        "decode 3.0 Mweights/s",
    ]
    box = browser.value("(b => [b.left, b.right])(document.querySelectorAll('.tip')[5]"
                        ".getBoundingClientRect())")  # fmt: skip
    assert 0 <= box[0] < box[1] <= 360
    assert not browser.messages


@needs_chromium
def test_a_hostile_name_is_text_in_a_browser(
    browser: chromium.Chromium, coded_query: CodecTensor, tmp_path: Path
) -> None:
    report_tensors([(HOSTILE, coded_query)]).to_html(tmp_path / "page.html")
    browser.requests.clear()
    browser.open(tmp_path / "page.html", 800, 600)
    assert browser.value("document.title") == "Compression report"
    assert "<img" in browser.value("document.getElementById('name').textContent")
    assert not [url for url in browser.requests if url.endswith("/x")]
