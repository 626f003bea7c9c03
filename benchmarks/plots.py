"""Draw the curves of the documents from benchmarks/results/.

    python benchmarks/plots.py
    python benchmarks/plots.py benchmarks/results/sweep_minilm.json

Writes docs/rate_distortion.png, docs/rate_perplexity.png, docs/calibration.png and
docs/calibration_layers.png; or, of what `torchcodec-weights sweep`
wrote, SNR and each metric against bits per weight for every model, docs/sweep_MODEL_snr.png and so
on.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter

from torchcodec_weights.encoder.rate import DB_PER_BIT
from torchcodec_weights.evaluation.choices import TITLES
from torchcodec_weights.evaluation.rows import Row

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweeps", nargs="*", type=Path, help="JSON files of sweeps")
    args = parser.parse_args()
    for path in args.sweeps:
        sweep(json.loads(path.read_text()))
    if args.sweeps:
        return
    rate_distortion(json.loads((RESULTS / "rate_distortion.json").read_text()))
    uniform = json.loads((RESULTS / "perplexity.json").read_text())
    rate_perplexity(uniform)
    rows = json.loads((RESULTS / "calibration.json").read_text())
    calibration([row for row in rows if row["model"] == "smollm2" and row["start"] == 0], uniform)
    calibration_layers(rows)


def calibration(rows: list[Row], uniform: list[Row], tokens: int = 4092) -> None:
    """Perplexity against bits per weight, with `calibrate` and without."""
    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        points = curves.setdefault((row["codec"], row["method"]), [])
        points.append((row["bits_per_weight"], row["perplexity"][str(tokens)]))
    for row in uniform:
        codec, _, bits = row["method"].partition(":")
        if (codec, "calibrate") in curves and row["tokens"] == tokens and float(bits) <= 4:
            points = curves.setdefault((codec, "uniform"), [])
            points.append((row["bits_per_weight"], row["perplexity"]))
    figure, axes = plt.subplots(figsize=(7, 4.2))
    colors = {codec: f"C{number}" for number, codec in enumerate({codec: 0 for codec, _ in curves})}
    for (codec, method), points in curves.items():
        axes.plot(
            *zip(*sorted(points), strict=True),
            "-" if method == "calibrate" else ":",
            marker="o",
            color=colors[codec],
            label=f"{codec}, calibrate" if method == "calibrate" else codec,
        )
    axes.set_yscale("log")
    ticks = [25, 30, 40, 60, 100, 200, 400]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("bits per weight, everything counted")
    axes.set_ylabel("perplexity")
    axes.set_title("SmolLM2-135M, WikiText-2, 4,092 tokens")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "calibration.png", dpi=120)


def calibration_layers(rows: list[Row]) -> None:
    """Bits of each layer of SmolLM2 with `ectcq` at 2 bits on average."""
    row = next(
        row
        for row in rows
        if row["model"] == "smollm2" and row["codec"] == "ectcq"
        if row["method"] == "calibrate" and row["bits"] == 2.0
    )
    kinds: dict[str, list[tuple[int, float]]] = {}
    for name, bits in row["layers"].items():
        parts = name.split(".")
        kinds.setdefault(parts[4].removesuffix("_proj"), []).append((int(parts[2]), bits))
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for kind, points in kinds.items():
        axes.plot(*zip(*sorted(points), strict=True), marker=".", label=kind)
    axes.axhline(row["bits"], color="black", linewidth=1)
    axes.set_xlabel("block")
    axes.set_ylabel("bits per weight")
    axes.set_title("SmolLM2-135M, 2 bits on average")
    axes.grid(alpha=0.3)
    axes.set_ylim(top=4.5)
    axes.legend(ncol=7, fontsize=8, loc="upper center")
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "calibration_layers.png", dpi=120)


def rate_distortion(rows: list[Row]) -> None:
    """Gap to Shannon's limit against bits per weight, of each codec's slowest preset measured."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        if "error" not in row:
            points = curves.setdefault(row["codec"], {}).setdefault(row["preset"], [])
            points.append((row["bits"], row["gap_db"]))
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for codec, presets in curves.items():
        preset, points = list(presets.items())[-1]
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=f"{codec} ({preset})")
    axes.axhline(0, color="black", linewidth=1)
    axes.annotate("Shannon's limit", (4.6, 0.08))
    axes.set_xlabel("bits per weight, everything counted")
    axes.set_ylabel(f"gap to {DB_PER_BIT:.2f} dB per bit, in dB")
    axes.set_title("Gaussian weights, 1024 × 1024")
    axes.set_ylim(bottom=-0.2)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "rate_distortion.png", dpi=120)


def rate_perplexity(rows: list[Row]) -> None:
    """Perplexity of SmolLM2 against bits per weight."""
    tokens = max(row["tokens"] for row in rows)
    curves: dict[str, list[tuple[float, float]]] = {}
    measured = [row for row in rows if row["tokens"] == tokens]
    dense = next(row["perplexity"] for row in measured if row["method"] == "dense")
    for row in measured:
        name = row["method"].split(":")[0]
        if name != "dense":
            curves.setdefault(name, []).append((row["bits_per_weight"], row["perplexity"]))
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for name, points in curves.items():
        if len(points) < 3:
            continue
        style = "--" if name in ("rtn", "hqq") else "-"
        axes.plot(*zip(*sorted(points), strict=True), style, marker="o", label=name)
    axes.axhline(dense, color="black", linewidth=1)
    axes.annotate("dense", (4.3, dense * 0.9))
    axes.set_yscale("log")
    axes.set_ylim(20, 2000)
    axes.set_xlabel("bits per weight, everything counted")
    axes.set_ylabel("perplexity")
    axes.set_title(f"SmolLM2-135M, WikiText-2, {tokens:,} tokens")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "rate_perplexity.png", dpi=120)


def sweep(rows: list[Row]) -> None:
    """SNR and metrics against bits per weight, a figure for each model and each of them."""
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model and "error" not in row]
        label = Path(model).name
        snr = _curves(mine, "snr_db")
        figure, axes = _figure(snr, f"{label}: weights", "SNR in dB")
        rates = [bits for points in snr.values() for bits, _ in points]
        ends = np.array([min(rates), max(rates)])
        axes.plot(ends, DB_PER_BIT * ends, color="black", linewidth=1, label="Shannon, Gaussian")
        _save(figure, axes, f"{label}_snr")
        for metric in dict.fromkeys(row["metric"] for row in mine):
            measured = [row for row in mine if row["metric"] == metric]
            figure, axes = _figure(
                _curves(measured, "value"), f"{label}: {TITLES[metric]}", TITLES[metric]
            )
            for row in measured:
                if row["codec"] == "dense":
                    axes.axhline(row["value"], color="black", linewidth=1, label="dense")
            if metric == "perplexity":
                axes.set_yscale("log")
            _save(figure, axes, f"{label}_{metric}")


def _curves(rows: list[Row], value: str) -> dict[str, list[tuple[float, float]]]:
    """Points (bits, value) of each codec and preset, but of those without loss."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["asked_bits"] is not None and row[value] is not None:
            name = row["codec"] if row["preset"] is None else f"{row['codec']} ({row['preset']})"
            curves.setdefault(name, []).append((row["bits"], row[value]))
    return curves


def _figure(curves: dict[str, list[tuple[float, float]]], title: str, ylabel: str) -> Any:
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for name, points in curves.items():
        axes.plot(*zip(*sorted(set(points)), strict=True), marker="o", label=name)
    axes.set_xlabel("bits per weight, everything counted")
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both")
    return figure, axes


def _save(figure: Any, axes: Any, name: str) -> None:
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / f"sweep_{name}.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
