"""What the Triton kernels compile to, for GPUs that need not be there: machine instructions, and a predicted time.

    python benchmarks/kernels_static.py [--quick] [--table tests/ops/kernels.json] [--output DIRECTORY]

Each variant is compiled as it is launched, by the compiler and assembler that come with Triton, and its instructions
are counted: those of a thread, by element. The prediction is of an H200: the time that its busiest pipe takes, beside
the floor, which is the bytes that must be moved at 4 TB/s. It knows nothing of latencies: a kernel takes no less.
``--table`` writes the counts that tests/ops/test_kernels_static.py holds later versions against.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dropit.ops import triton as kernels
from dropit.ops.reference import Rescaling
from dropit.packed import Layout

TARGETS = {"A100": 80, "H200": 90}
N = 2**20  # elements
HEADER = [
    "kernel",
    *TARGETS,
    "registers",
    "barriers",
    "bytes a load",
    "a store",
    "floor",
    "predicted",
    "pipe",
    "by floor",
]
# Threads' instructions a clock of one of an H200's 132 multiprocessors, and clocks a nanosecond.
RATES = {"issue": 128, "integer": 64, "conversion": 16, "memory": 32}
CLOCK, PROCESSORS, BANDWIDTH = 1.755, 132, 4000  # GHz, count, bytes a nanosecond
LOOPS = 13.5  # steps of the search in a block of 256 normal numbers of which one in ten is kept, on average
PIPES = {
    "memory": r"LDG|STG|LDS|STS|SHFL|ATOM|RED",
    "conversion": r"I2F|F2I|F2F|MUFU|FRND|POPC|FLO",
    "integer": r"IADD|LOP|SHF|ISETP|FSETP|SEL|FSEL|FMNMX|VIMNMX|IMNMX|PRMT|LEA|VIADD|PLOP|SGXT|BMSK|VOTE|IMAD|IABS",
}


class Launch(NamedTuple):
    """Of a kernel: its arguments, the constants among them, and how many elements a program of so many warps takes."""

    kernel: Any
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    elements: int


class Compiled(NamedTuple):
    """Of a variant for one target. ``counts``: of a thread's instructions, by name with modifiers."""

    counts: Counter[str]
    threads: int
    elements: int
    registers: int

    @property
    def by_element(self) -> float:
        """Threads' instructions by element."""
        return self.counts.total() * self.threads / self.elements

    def width(self, name: str) -> float:
        """Bytes of a load or store from global memory, on average."""
        sizes = [
            (count, int(found[1]) // 8 if (found := re.search(r"\.[US]?(8|16|64|128)(\.|$)", each)) else 4)
            for each, count in self.counts.items()
            if each.startswith(name)
        ]
        return sum(count * size for count, size in sizes) / sum(count for count, _ in sizes)

    def predicted(self) -> tuple[float, str]:
        """Nanoseconds that an H200 takes for 1000 elements at least, and the pipe that takes them."""
        of_pipe = Counter({"issue": self.counts.total()})
        for name, count in self.counts.items():
            of_pipe.update({pipe: count for pipe, names in PIPES.items() if re.match(names, name)})
        each = 1000 * self.threads / self.elements / (CLOCK * PROCESSORS)
        return max((count * each / RATES[pipe], pipe) for pipe, count in of_pipe.items())


def launches() -> dict[str, Launch]:
    """Every kernel as it is launched for tensors of N elements, by name."""
    found: dict[str, Launch] = {}
    title, eight = "", ()

    def record(kernel: Any, size: tuple[int, int], x: Tensor, rows: int, *arguments: Any, **constants: Any) -> None:
        names = [name for name in kernel.arg_names if name not in constants and name != "ROWS"]
        rows_constant = {**constants, "ROWS": size[0]}
        given = dict(zip(names, arguments, strict=True))
        found[title] = Launch(kernel, given, rows_constant, size[1], N // rows * size[0])

    with mock.patch.object(kernels, "_launch", record):
        for dtype in (torch.bfloat16, torch.float32):
            kind = str(dtype).removeprefix("torch.")
            x = torch.empty(N, dtype=dtype)
            layout = Layout(x.shape, dtype, (0,), per_block=26)
            title = f"pack, {kind}"
            packed = kernels.pack_largest(x, 256, 26, 0, layout)
            title = f"unpack, {kind}"
            kernels.unpack(packed)
            title = f"mark, {kind}"
            bits = kernels.range_bitmask(x, 0.0, float("inf"))
            title = f"keep, {kind}"
            kernels.apply_bitmask(x, bits)
            for width in (16, 8, 4, 2):
                title = f"quantize to {width} bits, {kind}"
                codes, scales = kernels.quantize(x, width)
                title = f"dequantize from {width} bits, {kind}"
                kernels.dequantize(codes, scales, dtype, N)
                eight = (codes, scales) if width == 8 else eight
            for name, inner in (("by row", 1024), ("by element", 1)):
                title = f"dequantize from 8 bits, rescale {name}, bound, {kind}"
                by = Rescaling(torch.empty(1024), torch.empty(1024), inner, 0.0, dtype=dtype)
                kernels.dequantize(*eight, dtype, N, by)
            statistics = torch.empty(N // 1024), torch.empty(N // 1024)
            title = f"normalize by row, quantize to 8 bits, {kind}"
            kernels.quantize(x, 8, statistics=(*statistics, 1024))
            title = f"normalize by element, quantize to 8 bits, {kind}"
            kernels.quantize(x, 8, statistics=(*statistics, 1))
    return found


def compiled(launch: Launch, capability: int) -> Compiled:
    """Compile it, with what Triton would find out of its arguments."""
    signature, aligned = {}, {}
    for place, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name] = "constexpr"
            continue
        value = launch.arguments[name]
        signature[name] = _type_of(value)
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            aligned[place,] = [["tt.divisibility", 16]]
        elif value == 1:
            signature[name] = "constexpr"
            launch.constants[name] = 1
    source = ASTSource(launch.kernel, signature, constexprs=launch.constants, attrs=aligned)
    options = {"num_warps": launch.warps}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    code = disassembled(built.asm["cubin"])
    registers = 1 + max(map(int, re.findall(r"\bR(\d+)\b", code)))
    return Compiled(counted(code), 32 * launch.warps, launch.elements, registers)


def counted(code: str) -> Counter[str]:
    """How often a thread runs each instruction; every branch that is not a loop is taken to be run."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    for label, line in re.findall(r"^(?:\.(L_\w+):|\s+/\*[0-9a-f]{4,}\*/\s+(.*);)", code, re.MULTILINE):
        if label:
            labels[label] = len(lines)
        else:
            lines.append(line)
    times = [1.0] * len(lines)
    for end, line in enumerate(lines):
        target = re.search(r"\bBRA\b.*\.(L_\w+)", line)
        if target and labels[target[1]] < end:  # the one after the last instruction branches to itself
            times[labels[target[1]] : end + 1] = [LOOPS] * (end + 1 - labels[target[1]])
    counts: Counter[str] = Counter()
    for line, often in zip(lines, times, strict=True):
        name = re.sub(r"^@!?U?P\w+ +", "", line).split()[0]
        if name not in ("NOP", "BRA", "EXIT"):
            counts[name] += often  # type: ignore[assignment]  # of an average
    return counts


def disassembled(binary: bytes) -> str:
    """The machine code as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _type_of(value: Any) -> str:
    """As Triton's signatures have it."""
    if not isinstance(value, Tensor):
        return "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
    names |= {torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64"}
    return f"*{names[value.dtype]}"


def bytes_moved(launch: Launch) -> float:
    """Bytes that it reads and writes, by element: of each tensor once."""
    tensors = {id(value): value.nbytes for value in launch.arguments.values() if isinstance(value, Tensor)}
    return sum(tensors.values()) / N


def measure(name: str, launch: Launch) -> dict[str, Any]:
    """Return the row of a kernel."""
    row: dict[str, Any] = {"kernel": name, "floor": 1000 * bytes_moved(launch) / BANDWIDTH}
    for target, capability in TARGETS.items():
        found = compiled(launch, capability)
        row[target] = {
            "instructions": round(found.by_element, 2),
            "registers": found.registers,
            "load": found.width("LDG"),
            "store": found.width("STG"),
            "spills": sum(count for each, count in found.counts.items() if each.startswith(("LDL", "STL"))),
            "barriers": sum(count for each, count in found.counts.items() if each.startswith("BAR")),
            "counts": dict(found.counts.most_common()),
        }
    row["predicted"], row["pipe"] = found.predicted()
    return row


def cells(row: dict[str, Any]) -> list[str]:
    """Return the row as text."""
    h200 = row["H200"]
    counts = [f"{row[target]['instructions']:.1f}" for target in TARGETS]
    widths = [f"{h200[each]:.1f}" for each in ("load", "store")]
    slowest = max(row["floor"], row["predicted"])
    times = [f"{row['floor']:.2f}", f"{row['predicted']:.2f}", row["pipe"], f"{slowest / row['floor']:.1f}"]
    return [row["kernel"], *counts, str(h200["registers"]), str(h200["barriers"]), *widths, *times]


def main() -> None:
    """Print the table."""
    import report  # here, since a test takes the rest from a module of another name

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", help="where to write the counts that a test holds later versions against")
    parser.add_argument("--output", help="where to write the results")
    parser.add_argument("--quick", action="store_true", help="two kernels, to see that it runs")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, and the interpreter compiles nothing")
    chosen = list(launches().items())[: 2 if args.quick else None]
    print(report.table(HEADER, []), flush=True)
    rows = []
    for name, launch in chosen:
        rows.append(measure(name, launch))
        print(f"| {' | '.join(cells(rows[-1]))} |", flush=True)
    report.write(args.output, "kernels-static", rows, report.table(HEADER, [cells(row) for row in rows]))
    if args.table:
        kept = ("instructions", "registers", "spills")
        counts = {
            row["kernel"]: {target: {each: row[target][each] for each in kept} for target in TARGETS} for row in rows
        }
        table = {"triton": triton.__version__, "kernels": counts}
        Path(args.table).write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
