"""Draw the curves of the documents from benchmarks/results/.

    python benchmarks/plots.py

Writes docs/rate_distortion.png and docs/rate_perplexity.png.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from torchcodec_weights.rate import DB_PER_BIT

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    rate_distortion(json.loads((RESULTS / "rate_distortion.json").read_text()))
    rate_perplexity(json.loads((RESULTS / "perplexity.json").read_text()))


def rate_distortion(rows: list[dict[str, Any]]) -> None:
    """Gap to Shannon's limit against bits per weight, of each codec's slowest preset measured."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        if "error" not in row:
            preset = curves.setdefault(row["codec"], {}).setdefault(row["preset"], [])
            preset.append((row["bits"], row["gap_db"]))
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


def rate_perplexity(rows: list[dict[str, Any]]) -> None:
    """Perplexity of SmolLM2 against bits per weight."""
    tokens = max(row["tokens"] for row in rows)
    curves: dict[str, list[tuple[float, float]]] = {}
    dense = None
    for row in rows:
        if row["tokens"] != tokens:
            continue
        name = row["method"].split(":")[0]
        if name == "dense":
            dense = row["perplexity"]
        else:
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


if __name__ == "__main__":
    main()
