"""Decoding and multiplying on an NVIDIA GPU, beside dense and int4 weights, and whole models.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json
    python benchmarks/gpu.py --first --packages gpu_packages.tar.xz --json first.json

The former measures the parts that `gpu_measures.py` describes. The latter is for the first minutes
on a machine with a GPU, in less than nine of them: what is there, whether all is right, how fast it
is (`gpu_first.py`). It runs from a source tree and needs no network: `pack_gpu.py` packs beforehand
what PyTorch for CUDA, NumPy, transformers and pytest do not bring. `--rehearse` goes through the
same steps without a GPU, on kernels compiled for the CPU: mistakes in the steps are found there.
"""

import argparse
from pathlib import Path

import gpu_first


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--json", type=Path, metavar="FILE", help="write what is measured there")
    options.add_argument("--parts", nargs="*", default=["decode", "product", "model"])
    options.add_argument("--codecs", nargs="*", help="of decode; default: all with a GPU's decoder")
    options.add_argument("--first", action="store_true", help="the first minutes on a machine")
    options.add_argument("--rehearse", action="store_true", help="with --first: without a GPU")
    options.add_argument("--packages", type=Path, help="with --first: what pack_gpu.py packed")
    options.add_argument(
        "--seconds", type=float, default=gpu_first.SECONDS, help="with --first: of all steps"
    )
    args = options.parse_args()
    if args.first:
        raise SystemExit(
            gpu_first.run(args.json, args.packages, seconds=args.seconds, rehearse=args.rehearse)
        )
    from gpu_measures import measure  # needs the packages

    measure(args.json, args.parts, args.codecs)


if __name__ == "__main__":
    main()
