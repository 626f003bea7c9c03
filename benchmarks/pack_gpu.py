"""Packs what `gpu.py --first` needs on a machine without a network: one archive for --packages.

    python benchmarks/pack_gpu.py gpu_packages.tar.xz --python 3.12

Wheels are fetched by pip for that version of Python on x86-64 Linux, unpacked, and stripped of what
is not used there: CUDA extensions of torchao, tests, headers. The compiled library of this package
goes along, which must have been built here (`make .venv/.installed`). PyTorch for CUDA, NumPy,
transformers and pytest are not packed: the machine must have them.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gpu_first import LIBRARY

from torchcodec_weights.codecs.common import compiled
from torchcodec_weights.system.files import unfinished

PACKAGES = (
    "torchao",
    "av",
    "google-crc32c",
    "safetensors",
    "tqdm",
    "hypothesis",
    "sortedcontainers",
    "pytest-timeout",
    "PyNvVideoCodec",
)
MOST_BYTES = 50 * 2**20
_GLIBC = (39, 35, 34, 31, 28, 27, 24, 17)
# Of whole paths in a wheel.
_UNUSED = re.compile(
    r"(samples|benchmarks|tests?)/.*|[^/]+\.data/.*|torchao/.*\.so$|torchao/(prototype|_models)/.*\.(cu|cuh|h|cpp)$|.*/(tests?|include)/.*"
    r"|.*\.(pyx|pxd|pyi|a|h|hpp)$|hypothesis/vendor/tlds.*"
)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("archive", type=Path)
    options.add_argument("--python", default="3.12", help="its version there")
    args = options.parse_args()
    if not compiled.LIBRARY.exists():
        raise SystemExit(f"{compiled.LIBRARY.name} was not built: make .venv/.installed")
    with tempfile.TemporaryDirectory() as name:
        wheels, site = Path(name, "wheels"), Path(name, "site")
        site.mkdir()
        download(wheels, args.python)
        for wheel in sorted(wheels.glob("*.whl")):
            unpack(wheel, site)
        shutil.copy(compiled.LIBRARY, site / LIBRARY)
        with unfinished(args.archive) as temporary, tarfile.open(temporary, "w:xz") as archive:
            for path in sorted(site.iterdir()):
                archive.add(path, path.name)
    size = args.archive.stat().st_size
    print(f"{args.archive}: {size / 2**20:.1f} MiB")
    if size >= MOST_BYTES:
        raise SystemExit(f"that is {MOST_BYTES / 2**20:.0f} MiB or more")


def download(folder: Path, python: str) -> None:
    """Fetch the wheels, in the versions that are installed here where they are."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in _GLIBC] + ["manylinux2014_x86_64"]
    wanted = []
    for package in PACKAGES:
        try:
            wanted.append(f"{package}=={version(package).partition('+')[0]}")
        except PackageNotFoundError:
            wanted.append(package)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--dest", str(folder)]
    command += ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    command += [f"--platform={platform}" for platform in platforms]
    subprocess.run([*command, *wanted], check=True)


def unpack(wheel: Path, site: Path) -> None:
    """Unpack a wheel, but for what is not used."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            if not _UNUSED.fullmatch(member.filename):
                archive.extract(member, site)


if __name__ == "__main__":
    main()
