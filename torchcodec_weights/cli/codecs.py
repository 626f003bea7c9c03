"""`codecs`: lists the codecs and what each can do on this machine."""

import argparse
import json
from dataclasses import asdict

from torchcodec_weights.codecs.records import CodecInfo
from torchcodec_weights.decoders.choice import available_codecs


def run(args: argparse.Namespace) -> None:
    """Run the command with the arguments of `cli.arguments`."""
    infos = available_codecs()
    if args.json:
        print(json.dumps([asdict(info) for info in infos], indent=2))
        return
    rows = [("codec", "kind", "encoder", "decoders", "missing"), *map(_row, infos)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _row(info: CodecInfo) -> tuple[str, str, str, str, str]:
    decoders = ", ".join(f"{device}: {name}" for device, name in info.decoders.items())
    kind = "lossy" if info.lossy else "lossless"
    return info.name, kind, info.encoder or "-", decoders or "-", info.missing or ""
