"""`inspect`: lists the weights in a compressed file or directory.

Of safetensors only headers and scales are read, without PyTorch, whose import takes seconds. What
needs tensors is in `inspect_tensors.py`.
"""

import argparse

from torchcodec_weights.cli.page import check_page
from torchcodec_weights.models.folder import safetensors_files
from torchcodec_weights.models.headers import header_table
from torchcodec_weights.models.table import Table
from torchcodec_weights.system.package import import_package


def run(args: argparse.Namespace) -> None:
    """Run the command with the arguments of `cli.arguments`."""
    if args.original is not None and args.html is None:
        raise ValueError(f"--original={str(args.original)!r}: allowed: with --html")
    if args.html is not None:
        check_page(args.html)
    table = None if args.html or args.extract_tile else _of_headers(args)
    if table is None:
        import_package()
        from torchcodec_weights.cli.inspect_tensors import extract, report

        if args.extract_tile:
            extract(args.path, *args.extract_tile)
            return
        table = report(args.path, args.html, args.original)
    print(table.to_json() if args.json else table)


def _of_headers(args: argparse.Namespace) -> Table | None:
    files = safetensors_files(args.path)
    return header_table(files, args.path) if files else None
