"""The first minutes on a machine with an NVIDIA GPU: `gpu.py --first` runs these steps.

Each step is a process of its own with a limit of time, so one that fails or hangs does not lose the
others; results go to the JSON file after each. Only Python's own library is used here: what the
steps need is unpacked first, from what `pack_gpu.py` packed.

    environment       the GPU, its driver, PyTorch, NVIDIA's libraries, what decodes each codec
    smoke             each kernel on small weights, compared with the CPU
    memcheck          the same under compute-sanitizer, and racecheck after it
    products          product for 1 to 16 tokens and decode to bfloat16, beside dense weights
    tests             tests/test_gpu_ectcq.py, test_gpu_decoders.py and test_gpu_driver.py
    model             a model of Llama 7B's shape at 2 bits as a CUDA graph, and dense
    profile           two kernels under Nsight Compute

`steps_gpu.py` has what the steps do, and says what a rehearsal changes.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SECONDS = 520.0
"""Of all steps together."""

LIBRARY = "libcodecs.so"
_LIBRARY_FOLDER = ROOT / "torchcodec_weights" / "codecs" / "common"
_TAIL = 6000  # characters of a step's output that are kept
_CUDA_TOOLS = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute")

_SECTIONS = (
    "SpeedOfLight",
    "WarpStateStats",
    "SchedulerStats",
    "MemoryWorkloadAnalysis",
)


@dataclass(frozen=True)
class Step:
    """A step: its command, how long it may take, and the program that it needs, if it needs one."""

    name: str
    command: tuple[str, ...]
    seconds: float
    tool: str | None = None


def steps(*, rehearse: bool) -> list[Step]:
    """All steps in their order."""
    flags = ("--rehearse",) if rehearse else ()
    own = (sys.executable, str(HERE / "steps_gpu.py"))
    tests = [
        str(ROOT / "tests" / f"test_gpu_{name}.py") for name in ("ectcq", "decoders", "driver")
    ]
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=60")
    sanitizer = ("compute-sanitizer", "--error-exitcode=9", "--tool")
    profiler = (
        "ncu",
        "--clock-control=none",
        "--kernel-name=regex:ectcq_(multiply_1|columns_multiply|decode_bfloat16)$",
        "--launch-count=3",
        *(part for section in _SECTIONS for part in ("--section", section)),
    )
    smoke, profile = (*own, "smoke", *flags), (*own, "profile", *flags)
    return [
        Step("environment", (*own, "environment", *flags), 60),
        Step("smoke", smoke, 60),
        Step("memcheck", (*sanitizer, "memcheck", *smoke), 75, "compute-sanitizer"),
        Step("products", (*own, "products", *flags), 150),
        Step("tests", (*pytest, *tests), 120),
        Step("model", (*own, "model", *flags), 90),
        Step("profile", (*profiler, *profile), 60, "ncu"),
        Step("racecheck", (*sanitizer, "racecheck", *smoke), 60, "compute-sanitizer"),
    ]


def run(path: Path | None, packages: Path | None, *, seconds: float, rehearse: bool) -> int:
    """Run all steps and write down what they found.

    Args:
        packages: what `pack_gpu.py` packed; None if all is installed.
        seconds: of all steps together; those for which nothing is left are skipped.

    Returns:
        How many steps failed.
    """
    begun = time.monotonic()
    results: dict[str, Any] = {"rehearsal": rehearse, "steps": {}}
    with tempfile.TemporaryDirectory() as folder:
        environment = _environment(Path(folder), packages)
        results["unpacked_seconds"] = round(time.monotonic() - begun, 1)
        for step in steps(rehearse=rehearse):
            left = seconds - (time.monotonic() - begun)
            output = Path(folder, f"{step.name}.json")
            found = _run(step, min(step.seconds, left), environment, output, rehearse=rehearse)
            results["steps"][step.name] = found
            results["seconds"] = round(time.monotonic() - begun, 1)
            _write(path, results)
            told = found.get("skipped") or f"exit status {found['status']}"
            print(f"{step.name}: {told}, {found.get('seconds', 0)} s", flush=True)
    return sum(
        "skipped" not in found and found["status"] != 0 for found in results["steps"].values()
    )


def _environment(folder: Path, packages: Path | None) -> dict[str, str]:
    """Unpack what the steps need, and their environment variables."""
    paths = [str(ROOT), str(HERE), str(ROOT / "tests")]
    if packages is not None:
        unpacked = folder / "packages"
        with tarfile.open(packages) as archive:
            archive.extractall(unpacked, filter="data")
        paths.insert(0, str(unpacked))
        if not (_LIBRARY_FOLDER / LIBRARY).exists():
            shutil.copy(unpacked / LIBRARY, _LIBRARY_FOLDER / LIBRARY)
    if os.environ.get("PYTHONPATH"):
        paths.append(os.environ["PYTHONPATH"])
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PATH": os.pathsep.join((os.environ["PATH"], *_CUDA_TOOLS)),
        "TQDM_DISABLE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def _run(
    step: Step, seconds: float, environment: dict[str, str], output: Path, *, rehearse: bool
) -> dict[str, Any]:
    """Run a step, at most so long; what it wrote to `output` even if it did not come to its end."""
    command = list(step.command)
    if step.tool is not None and shutil.which(step.tool, path=environment["PATH"]) is None:
        if not rehearse:
            return {"skipped": f"there is no {step.tool}"}
        command = command[command.index(sys.executable) :]  # without the tool
    if seconds < 10:
        return {"skipped": "no time is left"}
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment | {"RESULTS": str(output)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=seconds)
        status: int | str = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        status = f"stopped after {seconds:.0f} s"
    return {
        "status": status,
        "seconds": round(time.monotonic() - started, 1),
        "found": json.loads(output.read_text()) if output.exists() else None,
        "output": printed[-_TAIL:],
    }


def _write(path: Path | None, results: dict[str, Any]) -> None:
    """Replace the file at once: it is whole at any time."""
    if path is not None:
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(json.dumps(results, indent=1) + "\n")
        temporary.replace(path)
