"""Machine instructions of ECTCQ's CUDA kernels for each step of 32 weights; no GPU is needed.

    python benchmarks/sass.py --json benchmarks/results/sass.json

The kernels are compiled by NVRTC and disassembled by `cuobjdump`, which needs `nvdisasm` beside it:
`pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`, or a CUDA toolkit on PATH.

A step reads at most one word of the stream in each lane, so steps are counted by loads of words:
one of 16 bits where words lie at even addresses, two of 8 bits where they lie at odd ones. Of all
cycles in a kernel's graph of basic blocks, the table has the one with the fewest instructions for
each step: the way of a warp through a stream when all that is rare does not happen. It is a lower
bound of what is issued; how long a step takes also depends on pipes, memory and latency.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import parser, write

from torchcodec_weights.codecs.common import cubins, nvrtc
from torchcodec_weights.codecs.ectcq import gpu

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
KERNELS = (
    *(f"ectcq_multiply_{tokens}" for tokens in (1, 2, 4, 8)),
    *(f"ectcq_decode_{name}" for name in ("float32", "float16", "bfloat16")),
    "ectcq_columns_multiply",
    *(f"ectcq_columns_decode_{name}" for name in ("float32", "float16", "bfloat16")),
)

WORD_LOADS = {
    "even": re.compile(r"LDG\.E\.U16\.CONSTANT"),
    "odd": re.compile(r"LDG\.E\.U8\.CONSTANT"),
}
LOADS_OF_STEP = {"even": 1, "odd": 2}
_OTHER = {"even": "odd", "odd": "even"}

# By the first letters of an instruction's name; the first that fits. Conversions and population
# counts run at a quarter of the rate of the others.
_PIPES = (
    ("tensor", r"HMMA|IMMA|DMMA"),
    ("quarter rate", r"POPC|MUFU|F2F\b|F2I\b|I2F\b|FLO|BREV"),
    ("memory", r"LD|ST|ATOM|RED|SHFL|CCTL"),
    (
        "control",
        r"BRA|BRX|JM|CALL|RET|EXIT|BS|BREAK|WARPSYNC|NOP|BAR|DEPBAR|YIELD|ACQ|ERRBAR|MEMBAR",
    ),
    ("uniform", r"U[A-Z]|R2UR|S2UR|VOTEU"),
    ("fma", r"FFMA|FMUL|FADD|IMAD|HFMA|HADD|HMUL"),
    ("alu", r""),
)


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # "@!P1 ", or empty
    text: str  # its name and operands

    @property
    def name(self) -> str:
        return self.text.split()[0]


@dataclass(frozen=True)
class Resources:
    """What a thread takes: registers, and bytes of local memory for what they cannot hold."""

    registers: int
    spilled_bytes: int


def tool() -> Path:
    """cuobjdump.

    Raises:
        SystemExit: it is not there; says what to install.
    """
    found = shutil.which("cuobjdump")
    if found is not None:
        return Path(found)
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in Path(folder).glob("*/bin/cuobjdump"):
            return path
    raise SystemExit(
        "there is no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    )


def dump(cubin: bytes, option: str) -> str:
    """What cuobjdump prints of machine code."""
    program = tool()
    environment = os.environ | {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), option, file.name]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        ).stdout


def functions(listing: str) -> dict[str, list[Instruction]]:
    """The instructions of each kernel, from `cuobjdump --dump-sass`."""
    found: dict[str, list[Instruction]] = {}
    instructions: list[Instruction] = []
    for line in listing.splitlines():
        if start := re.match(r"\s+Function : (\S+)", line):
            instructions = found.setdefault(start[1], [])
        elif code := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?(\S.*?)\s*;", line):
            instructions.append(Instruction(int(code[1], 16), code[2] or "", code[3]))
    return found


def resources(listing: str) -> dict[str, Resources]:
    """What each kernel takes, from `cuobjdump --dump-resource-usage`."""
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", listing)
    return {name: Resources(int(reg), int(stack) + int(local)) for name, reg, stack, local in found}


def blocks(instructions: list[Instruction]) -> tuple[list[list[Instruction]], list[list[int]]]:
    """Basic blocks of a kernel, and the numbers of the blocks that may follow each."""
    known = {instruction.address for instruction in instructions}
    starts = {instructions[0].address}
    targets: dict[int, int] = {}
    meeting: dict[str, int] = {}
    for one, following in zip(instructions, [*instructions[1:], None], strict=True):
        label = re.search(r"\b0x([0-9a-f]+)$", one.text)
        target = int(label[1], 16) if label and int(label[1], 16) in known else None
        if one.name.startswith("BSSY") and target is not None:
            meeting[one.text.split()[1].rstrip(",")] = target
            starts.add(target)
        # A branch for lanes that have diverged, which those of a step have not.
        jumps = one.name.startswith(("BRA", "BSYNC", "EXIT", "RET", "BRX", "JM"))
        if not jumps or one.name.startswith("BRA.DIV"):
            continue
        if one.name.startswith("BSYNC"):
            target = meeting.get(one.text.split()[1])
        if one.name.startswith(("BRA", "BSYNC")) and target is not None:
            targets[one.address] = target
            starts.add(target)
        if following is not None:
            starts.add(following.address)
    made: list[list[Instruction]] = []
    number: dict[int, int] = {}
    for one in instructions:
        if one.address in starts:
            number[one.address] = len(made)
            made.append([])
        made[-1].append(one)
    after = []
    for index, block in enumerate(made):
        last = block[-1]
        conditional = bool(last.predicate) or re.search(r"\s!?U?P\d+,", last.text) is not None
        follows = [number[targets[last.address]]] if last.address in targets else []
        ends = last.address in targets or last.name.startswith(("EXIT", "RET", "BRX", "JM"))
        if (conditional or not ends) and index + 1 < len(made):
            follows.append(index + 1)
        after.append(follows)
    return made, after


def best_cycle(costs: list[int], gains: list[int], after: list[list[int]]) -> list[int]:
    """The cycle of a graph with the least cost for each gain; none has an infinite one.

    Each round looks for a cycle with costs − ratio · gains below zero (Bellman and Ford), and takes
    its ratio for the next, until there is none.

    Returns:
        Its nodes; empty if no cycle has a gain.
    """
    ratio, best = float(sum(costs) + 1), list[int]()
    while True:
        weight = [cost - ratio * gain for cost, gain in zip(costs, gains, strict=True)]
        distance, before = [0.0] * len(costs), [-1] * len(costs)
        changed = -1
        for _ in costs:
            changed = -1
            for node, follows in enumerate(after):
                reached = distance[node] + weight[node]
                for other in follows:
                    if reached < distance[other] - 1e-9:
                        distance[other], before[other], changed = reached, node, other
            if changed < 0:
                return best
        for _ in costs:  # into the cycle
            changed = before[changed]
        cycle = [changed]
        while before[cycle[-1]] != changed:
            cycle.append(before[cycle[-1]])
        best = cycle[::-1]
        ratio = sum(costs[n] for n in best) / sum(gains[n] for n in best)


def pipe(instruction: Instruction) -> str:
    return next(name for name, names in _PIPES if re.match(names, instruction.name))


def hot_loop(instructions: list[Instruction], words: str, *, writes: bool) -> dict[str, Any] | None:
    """The loop of a kernel with the fewest instructions for each step; None if there is none.

    Args:
        words: "even" or "odd", the addresses of the stream's words.
        writes: whether each step writes its weights to memory.
    """
    made, after = blocks(instructions)
    loads = [sum(bool(WORD_LOADS[words].match(i.name)) for i in block) for block in made]
    # Of a loop that writes weights and one that only goes past them, the former.
    stores = [sum(i.name.startswith("STG") for i in block) for block in made]
    gains = [n + LOADS_OF_STEP[words] * stored for n, stored in zip(loads, stores, strict=True)]
    others = [any(WORD_LOADS[_OTHER[words]].match(i.name) for i in block) for block in made]
    usable = [
        [] if others[n] else [m for m in follows if not others[m]]
        for n, follows in enumerate(after)
    ]
    cycle = best_cycle([len(block) for block in made], gains if writes else loads, usable)
    if not cycle:
        return None
    steps = sum(loads[n] for n in cycle) / LOADS_OF_STEP[words]
    body = [instruction for n in cycle for instruction in made[n]]
    pipes = Counter(pipe(instruction) for instruction in body)
    return {
        "instructions": round(len(body) / steps, 1),
        "steps": steps,
        "pipes": {name: round(pipes[name] / steps, 1) for name, _ in _PIPES},
        "spills": sum(i.name.startswith(("LDL", "STL")) for i in body),
    }


def measure(architecture: str) -> list[dict[str, Any]]:
    """Rows of the table for a chip."""
    cubin = cubins.compile_source(gpu.SOURCE.read_text(), architecture)
    code, taken = functions(dump(cubin, "--dump-sass")), dump(cubin, "--dump-resource-usage")
    rows = []
    for kernel in KERNELS:
        own = resources(taken)[kernel]
        row: dict[str, Any] = {
            "architecture": architecture,
            "kernel": kernel,
            "registers": own.registers,
            "spilled_bytes": own.spilled_bytes,
        }
        for words in WORD_LOADS:
            row[words] = hot_loop(code[kernel], words, writes="decode" in kernel)
        rows.append(row)
    return rows


def main() -> None:
    args = parser(__doc__).parse_args()
    tool()
    if reason := nvrtc.missing():
        raise SystemExit(reason)
    rows = [row for architecture in ARCHITECTURES for row in measure(architecture)]
    write(args.json, {"nvrtc": "{}.{}".format(*nvrtc.version()), "kernels": rows})
    table: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        counts = [f"{row[words]['instructions'] if row[words] else '–'}" for words in WORD_LOADS]
        spilled = f" {row['spilled_bytes']} B spilled" if row["spilled_bytes"] else ""
        table[row["kernel"]].append(f"{counts[0]}, {counts[1]}{spilled}")
    print("| instructions a step at even, odd addresses |", " | ".join(ARCHITECTURES), "|")
    print("|---|" + "---|" * len(ARCHITECTURES))
    for kernel, cells in table.items():
        print(f"| `{kernel.removeprefix('ectcq_')}` |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
