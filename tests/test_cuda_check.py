"""What `make cuda-check` reads out of ptxas and cuobjdump, and what it objects to."""

from __future__ import annotations

from collections import Counter

from cuda_report import (
    Kernel,
    Rule,
    judge,
    nameless_complaints,
    parse_ptxas,
    parse_sass,
    readable,
    table,
)

PTXAS = """\
[3/9] Building CUDA object csrc/cuda/CMakeFiles/redknot_cuda.dir/pages/move_rows.cu.o
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4copyv' for 'sm_80'
ptxas info    : Function properties for _Z6helperv
    64 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads
ptxas info    : Function properties for _Z4copyv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 4096 bytes smem, 448 bytes cmem[0]
ptxas info    : Compiling entry function '_Z4copyv' for 'sm_90a'
ptxas info    : Function properties for _Z4copyv
    40 bytes stack frame, 16 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 80 registers, used 0 barriers, 40 bytes cumulative stack size
"""

SASS = """\
Fatbin elf code:
================
arch = sm_80
\tcode for sm_80
\t\tFunction : _Z4copyv
\t.headerflags\t@"EF_CUDA_SM80"
        /*0000*/                   MOV R1, c[0x0][0x28] ;       /* 0x00000a00ff017b82 */
                                                                /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, [R2.64] ;  /* 0x00 */
        /*0020*/             @UP1  LDG.E R4, [R2.64] ;          /* 0x00 */
        /*0030*/                   STG.E.128 [R2.64], R4 ;      /* 0x00 */
\tcode for sm_90a
\t\tFunction : _Z4copyv
        /*10000*/                  STL.64 [R1], R4 ;            /* 0x00 */
"""


def test_resources_are_read_per_kernel_and_architecture() -> None:
    kernels = parse_ptxas(PTXAS)
    assert list(kernels) == [("_Z4copyv", "80"), ("_Z4copyv", "90a")]
    fine, spilling = kernels.values()
    assert (fine.registers, fine.shared, fine.stack, fine.spill_stores) == (32, 4096, 0, 0)
    assert (spilling.registers, spilling.shared, spilling.stack) == (80, 0, 40)
    assert (spilling.spill_stores, spilling.spill_loads) == (16, 32)


def test_opcodes_are_counted_per_kernel_and_architecture() -> None:
    found = parse_sass(SASS)
    assert found["_Z4copyv", "80"] == {
        "MOV": 1,
        "LDG.E.128.CONSTANT": 1,
        "LDG.E": 1,
        "STG.E.128": 1,
    }
    assert found["_Z4copyv", "90a"] == {"STL.64": 1}


def test_what_ptxas_did_not_do_is_a_problem() -> None:
    log = PTXAS + (
        "ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to insufficient register resources for the wgmma pipeline in the function "
        "'_Z4copyv'\n"
    )
    kernels = parse_ptxas(log)
    assert all(len(kernel.complaints) == 1 for kernel in kernels.values())
    problems = judge(kernels.values(), (), [])
    assert "_Z4copyv (sm_90a): wgmma.mma_async instructions are serialized" in problems
    ignored = "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to"
    assert nameless_complaints(log) == []
    assert nameless_complaints(f"{log}{ignored}\n{ignored}\n") == [ignored]


def test_an_instruction_is_found_by_its_parts() -> None:
    kernel = Kernel("f", "80", opcodes=Counter({"LDG.E.128.CONSTANT": 2, "LDG.E": 3, "LDGSTS": 5}))
    assert [kernel.count(name) for name in ("LDG", "LDG.128", "LDG.64", "STG")] == [5, 2, 0, 0]


def test_names_lose_what_every_kernel_has() -> None:
    name = (
        "void redknot::gpu::(anonymous namespace)::move_rows_kernel<uint4, redknot::gpu::CopyRows>"
    )
    assert readable(name + "(redknot::gpu::CopyRows)") == "move_rows_kernel<uint4, CopyRows>"


def kernel_of(arch: str, **opcodes: int) -> Kernel:
    return Kernel("copy<uint4>", arch, 32, opcodes=Counter(opcodes))


def test_a_sound_build_raises_no_problem() -> None:
    kernels = [kernel_of("80", LDG=1), kernel_of("90a", LDG=1)]
    assert judge(kernels, ("80", "90a"), [Rule("^copy<", ("LDG",))]) == []


def test_every_kind_of_problem_is_named() -> None:
    spilling = kernel_of("80", STL=2)
    spilling.spill_stores, spilling.spill_loads = 8, 4
    rules = [
        Rule("^copy<", ("LDG",), max_registers=31, forbidden=("STL", "HMMA")),
        Rule("^gone", ()),
    ]
    assert judge([spilling], ("80", "90a"), rules) == [
        "no kernel was compiled for sm_90a",
        "copy<uint4> (sm_80) spills 12 bytes of registers",
        "copy<uint4> (sm_80) accesses local memory: 2 instructions",
        "copy<uint4> (sm_80) has no LDG",
        "copy<uint4> (sm_80) contains STL",
        "copy<uint4> (sm_80) uses 32 registers, its budget is 31",
        "no kernel matches ^gone",
    ]


def test_the_table_has_a_line_per_kernel() -> None:
    lines = table([kernel_of("90a", HGMMA=3), kernel_of("80")]).splitlines()
    assert len(lines) == 3
    assert lines[1].split() == ["copy<uint4>", "sm_80", "32", "0", "0", "0"]
    assert lines[2].split()[-1] == "HGMMA:3"
