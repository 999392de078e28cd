"""Reads what ptxas and cuobjdump say about kernels, and judges it. No tool is run here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

__all__ = [
    "RULES",
    "Kernel",
    "Rule",
    "judge",
    "nameless_complaints",
    "parse_ptxas",
    "parse_sass",
    "table",
]


@dataclass
class Kernel:
    """One kernel as compiled for one architecture; sizes in bytes, instructions by opcode."""

    name: str
    arch: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    complaints: list[str] = field(default_factory=list)
    opcodes: Counter[str] = field(default_factory=Counter)

    def count(self, instruction: str) -> int:
        """Instructions whose opcode has every dotted part of `instruction`: "LDG.128"."""
        parts = set(instruction.split("."))
        return sum(n for opcode, n in self.opcodes.items() if parts <= set(opcode.split(".")))


@dataclass(frozen=True)
class Rule:
    """What kernels whose readable name matches `kernel` must and must not contain, and may use."""

    kernel: str
    instructions: tuple[str, ...]
    max_registers: int = 255
    forbidden: tuple[str, ...] = ()


# What a kernel was written for, so that a refactoring cannot lose it silently. A rule that matches
# no kernel is an error too.
RULES = (
    Rule(r"^move_rows_kernel<uint4,", ("LDG.128", "STG.128")),
    # Prefill takes every register that 256 threads of an SM can have, and must not spill. Decode
    # lives from blocks per SM: as many of 128 threads (64 from head_dim 128 on) as their shared
    # memory lets in.
    Rule(r"^attend_kernel<\w+, \d+, true, \w+>", ("HMMA", "LDSM", "LDGSTS")),
    Rule(
        r"^attend_kernel<\w+, (32|64), false, false>",
        ("HMMA", "LDSM", "LDGSTS"),
        max_registers=128,
    ),
    Rule(
        r"^attend_kernel<\w+, (128|256), false, false>",
        ("HMMA", "LDSM", "LDGSTS"),
        max_registers=224,
    ),
    # All of a multiprocessor's registers: a block each.
    Rule(r"^row_gemm_kernel<\w+, ", ("HMMA", "LDSM", "LDGSTS")),
    # Its warpgroups of consumers take 232 registers each when it runs.
    Rule(r"^hopper_gemm_kernel<\w+, ", ("HGMMA", "UTMALDG", "USETMAXREG"), 168, ("HMMA",)),
    Rule(r"^gather_norm_kernel<(float, 4|__nv_bfloat16, 8|__half, 8)>", ("LDG.128", "STG.128")),
    # 384 threads may have 168 registers each, which warpgroups share out as they need them.
    Rule(
        r"^hopper_attend_kernel<",
        ("HGMMA", "UTMALDG", "USETMAXREG", "SYNCS"),
        max_registers=168,
        forbidden=("HMMA", "LDGSTS", "LDSM"),
    ),
    # As many blocks of 160 threads per SM as their stages let in: three, two, one.
    *(
        Rule(
            rf"^hopper_decode_kernel<\w+, {head_dim}>",
            ("HMMA", "LDSM", "UTMALDG", "SYNCS"),
            max_registers=registers,
            forbidden=("HGMMA", "LDGSTS"),
        )
        for head_dim, registers in ((64, 128), (128, 200), (256, 224))
    ),
    Rule(r"^plan_kernel", (), max_registers=64),
    Rule(r"^token_importance_kernel<(float, 4|__nv_bfloat16, 8|__half, 8)>", ("LDG.128",)),
    Rule(r"^merge_states_kernel<(float, 4|__nv_bfloat16, 8|__half, 8)>", ("LDG.128", "STG.128")),
    Rule(r"^realign_keys_kernel<(float, 4|__nv_bfloat16, 8|__half, 8),", ("LDG.128", "STG.128")),
)
# Worth a column of the table where present.
NOTABLE = ("LDG.128", "STG.128", "LDGSTS", "LDSM", "HMMA", "HGMMA", "UTMALDG", "UBLKCP")

# What ptxas says of a kernel when it runs, but not as it was written.
COMPLAINT = re.compile(r"(wgmma\.mma_async instructions are serialized).*?function '(\w+)'")

KernelKey = tuple[str, str]
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


def parse_ptxas(log: str) -> dict[KernelKey, Kernel]:
    """Kernels by (mangled name, arch) out of what `-Xptxas=-v` printed; other lines are ignored."""
    kernels: dict[KernelKey, Kernel] = {}
    complaints: dict[str, set[str]] = {}
    current: Kernel | None = None
    in_properties = False
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
            current = Kernel(match[1], match[2])
            kernels[match[1], match[2]] = current
        elif match := COMPLAINT.search(line):
            complaints.setdefault(match[2], set()).add(match[1])
        elif match := re.search(r"Function properties for (\w+)", line):
            # Functions that a kernel calls have properties of their own; theirs are not its.
            in_properties = current is not None and match[1] == current.name
        elif current is None:
            continue
        elif in_properties and (
            match := re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
            )
        ):
            current.stack, current.spill_stores, current.spill_loads = map(int, match.groups())
            in_properties = False
        elif match := re.search(r"Used (\d+) registers", line):
            current.registers = int(match[1])
            shared = re.search(r"(\d+) bytes smem", line)
            current.shared = int(shared[1]) if shared else 0
    for (name, _), kernel in kernels.items():
        kernel.complaints = sorted(complaints.get(name, ()))
    return kernels


def nameless_complaints(log: str) -> list[str]:
    """What ptxas says without naming the kernel."""
    ignored = [line.strip() for line in log.splitlines() if "'setmaxnreg' ignored" in line]
    return sorted(set(ignored))


def parse_sass(dump: str) -> dict[KernelKey, Counter[str]]:
    """Opcode counts by (mangled name, arch) out of `cuobjdump -sass`."""
    found: dict[KernelKey, Counter[str]] = {}
    arch = ""
    opcodes: Counter[str] = Counter()
    for line in dump.splitlines():
        if match := re.match(r"\s*code for sm_(\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            opcodes = found.setdefault((match[1], arch), Counter())
        elif match := re.match(
            r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line
        ):
            opcodes[match[1]] += 1
    return found


def readable(demangled: str) -> str:
    """`void redknot::gpu::(anonymous namespace)::f<T>(Args)` as `f<T>`."""
    name = re.sub(r"\(anonymous namespace\)::|redknot::|gpu::|^void ", "", demangled)
    return re.sub(r"\([^()]*\)$", "", name)


def judge(
    kernels: Iterable[Kernel], archs: Iterable[str], rules: Iterable[Rule] = RULES
) -> list[str]:
    """What is wrong, one line each; `kernels` carry readable names."""
    kernels = list(kernels)
    problems = []
    for arch in sorted(set(archs) - {kernel.arch for kernel in kernels}):
        problems.append(f"no kernel was compiled for sm_{arch}")
    for kernel in kernels:
        where = f"{kernel.name} (sm_{kernel.arch})"
        if spilled := kernel.spill_stores + kernel.spill_loads:
            problems.append(f"{where} spills {spilled} bytes of registers")
        if local := kernel.count("LDL") + kernel.count("STL"):
            problems.append(f"{where} accesses local memory: {local} instructions")
        problems += [f"{where}: {complaint}" for complaint in kernel.complaints]
    for rule in rules:
        matching = [kernel for kernel in kernels if re.search(rule.kernel, kernel.name)]
        if not matching:
            problems.append(f"no kernel matches {rule.kernel}")
        problems += [
            f"{kernel.name} (sm_{kernel.arch}) has no {instruction}"
            for kernel in matching
            for instruction in rule.instructions
            if not kernel.count(instruction)
        ]
        problems += [
            f"{kernel.name} (sm_{kernel.arch}) contains {instruction}"
            for kernel in matching
            for instruction in rule.forbidden
            if kernel.count(instruction)
        ]
        problems += [
            f"{kernel.name} (sm_{kernel.arch}) uses {kernel.registers} registers, "
            f"its budget is {rule.max_registers}"
            for kernel in matching
            if kernel.registers > rule.max_registers
        ]
    return problems


def table(kernels: Iterable[Kernel]) -> str:
    """Resources and notable instructions, a line per kernel and architecture."""
    header = ("kernel", "arch", "registers", "shared", "stack", "spills", "instructions")
    rows = [header]
    for kernel in sorted(kernels, key=lambda k: (k.name, k.arch)):
        counts: Mapping[str, int] = {name: kernel.count(name) for name in NOTABLE}
        rows.append(
            (
                kernel.name,
                f"sm_{kernel.arch}",
                str(kernel.registers),
                str(kernel.shared),
                str(kernel.stack),
                str(kernel.spill_stores + kernel.spill_loads),
                " ".join(f"{name}:{n}" for name, n in counts.items() if n),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if 2 <= column <= 5 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
