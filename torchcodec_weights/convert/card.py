"""The model card of an output: its README.md, with the YAML that the Hugging Face Hub reads."""

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from torchcodec_weights.models.report import Report

_OWN_KEYS = ("base_model", "base_model_relation", "library_name", "torchcodec_weights")
_FRONT = re.compile(r"---\r?\n(.*?)\r?\n---\r?\n?(.*)", re.DOTALL)
# Places of the Hub's models: in URLs, and in its cache.
_HUB = (
    re.compile(r"/([\w.-]+/[\w.-]+)/resolve/[^/]+/?$"),
    re.compile(r"/models--([\w.-]+--[\w.-]+)/snapshots/[^/]+/?$"),
)


def base_model(source: str) -> str:
    """The name of a model on the Hub, by its URL or place in the cache; else its directory's."""
    for pattern in _HUB:
        if match := pattern.search(unquote(source)):
            return match[1].replace("--", "/")
    return re.sub(r"[^\w.-]", "-", source.rstrip("/").rpartition("/")[2])


def model_card(
    source: str, settings: Mapping[str, Any], report: Report, former: str, kind: str
) -> str:
    """The text of README.md.

    Args:
        source: path or URL of the dense model.
        settings: of the run.
        report: on its weights.
        former: README.md of the source, "" for none. Its YAML is kept, and its text follows.
        kind: name of transformers' class that opens it.
    """
    match = _FRONT.match(former)
    kept, text = _without(match[1], _OWN_KEYS) if match else "", match[2] if match else former
    count = sum(weight.shape[0] * weight.shape[1] for weight in report.weights)
    snr = [(w.snr_db, w.shape[0] * w.shape[1]) for w in report.weights if w.lossy]
    name = base_model(source)
    facts: dict[str, Any] = {
        "codec": settings["codec"],
        "bits_per_weight": round(report.bits_per_weight, 3),
        "encoded_weights": count,
        "version": settings["torchcodec_weights"],
    }
    if snr:
        facts["mean_snr_db"] = round(sum(db * n for db, n in snr) / sum(n for _, n in snr), 2)
    yaml = [f"base_model: {json.dumps(name)}", "base_model_relation: quantized"]
    yaml += ["library_name: transformers", "torchcodec_weights:"]
    yaml += [f"  {key}: {json.dumps(value)}" for key, value in facts.items()]
    lines = [
        "---",
        *yaml,
        *([kept] if kept else []),
        "---",
        "",
        f"# {name}, encoded",
        "",
        f"{len(report.weights)} weight matrices of {name} as bitstreams of `{settings['codec']}`: "
        f"{report.bits_per_weight:.3f} bits per weight, {report.stored_bytes:,} bytes where they "
        f"took {report.dense_bytes:,}."
        + (f" Mean SNR {facts['mean_snr_db']:.2f} dB." if snr else " Every bit is kept."),
        "",
        "```python",
        "import torchcodec_weights  # pip install torchcodec-weights",
        f"from transformers import {kind}",
        "",
        f'model = {kind}.from_pretrained("PATH_OR_NAME_OF_THIS_MODEL")',
        "```",
        "",
        "`torchcodec-weights verify` checks it for damage, `torchcodec-weights inspect` lists its "
        "weights.",
    ]
    if text.strip():
        lines += ["", text.strip()]
    return "\n".join(lines) + "\n"


def with_fact(card: str, key: str, value: float) -> str | None:
    """A card with one more fact about the encoded model; None if it has no such facts.

    Args:
        card: text of README.md.
        key: name of the fact; its former value is replaced.
        value: of the fact.
    """
    match = _FRONT.match(card)
    lines = match[1].splitlines() if match else []
    if "torchcodec_weights:" not in lines:
        return None
    lines = [line for line in lines if not line.startswith(f"  {key}: ")]
    lines.insert(lines.index("torchcodec_weights:") + 1, f"  {key}: {value:.4g}")
    return "---\n" + "\n".join(lines) + "\n---\n" + card[match.start(2) :] if match else None


def _without(yaml: str, keys: tuple[str, ...]) -> str:
    """Front matter without some of its keys, and what is indented or listed below them."""
    lines, skipped = [], False
    for line in yaml.splitlines():
        if key := re.match(r"([\w-]+)\s*:", line):
            skipped = key[1] in keys
        if not skipped:
            lines.append(line)
    return "\n".join(lines)
