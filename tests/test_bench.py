"""`redknot bench`: every benchmark in a tiny form, what it writes, and what it refuses."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from redknot import ops
from redknot.cli.main import main
from redknot.errors import InputError
from redknot.eval.bench import BENCHES, attention, attention_peers, bench_module, options, ttft
from redknot.eval.bench.attention_peers import Peer
from redknot.eval.bench.options import Options
from redknot.eval.bench.paged_inputs import Case, build, fill_random
from redknot.eval.bench.roofs import Roofs
from redknot.eval.bench.rows import Row, cells
from redknot.eval.bench.shapes import SHAPES
from redknot.eval.bench.timing import Timing, measure, ratio, rotating
from redknot.recovery import ModelShape

TINY = ModelShape(
    num_layers=2, num_q_heads=8, num_kv_heads=4, head_dim=32, hidden_dim=64, ffn_dim=96,
    vocab_size=512,
)  # fmt: skip
ROOFS = Roofs(dot_tflops=1.0, gemm_tflops=2.0, stream_gbps=100.0)
FIELDS = {"kind", "heads", "shape", "time_ms", "tflops", "gbps", "roof_fraction", "ratios"}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "Tiny", TINY)
    monkeypatch.setattr(options, "_QUICK_ROTATION_BYTES", 4 << 20)


def run(name: str, tmp_path: Path, *args: str) -> list[dict[str, Any]]:
    """Rows that the command wrote."""
    out = tmp_path / "rows.json"
    command = ["bench", name, "--quick", "--model", "Tiny", "--threads", "1", "--json", str(out)]
    assert main([*command, *args]) == 0
    rows = json.loads(out.read_text())
    for row in rows:
        assert row.keys() >= FIELDS
        assert row["time_ms"] > 0 and row["run"]["roofs"]["stream_gbps"] > 0
        assert row["run"]["command"].startswith(f"redknot bench {name} --quick")
        assert all(ratio > 0 for ratio in row["ratios"].values())
        assert row["ratios"].keys() <= row["peers_ms"].keys()
    return rows


def test_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "bench.png"
    rows = run("attention", tmp_path, "--context", "2048", "--skip-peer", "flex",
               "--plot", str(plot))  # fmt: skip
    assert [(r["kind"], r["heads"]) for r in rows] == [
        (kind, heads) for kind in ("prefill", "decode") for heads in ("global", "local", "mixed")
    ]
    printed = capsys.readouterr().out
    for row in rows:
        assert row["shape"] in printed
        assert row["peers_ms"], "every case has a peer"
        # Useful work over the time that is reported: the numbers belong together.
        case = Case(TINY, row["kind"], row["heads"], (2048,))
        assert row["tflops"] == pytest.approx(case.flops / row["time_ms"] / 1e9)
        assert row["gbps"] == pytest.approx(case.num_bytes(2) / row["time_ms"] / 1e6)
        assert row["details"]["rounds"] >= 3
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_ffn_rope_and_allocator(tmp_path: Path) -> None:
    both = run("ffn", tmp_path, "--context", "128")
    ffn, linear = ([r for r in both if r["kind"] == kind] for kind in ("ffn", "linear"))
    assert {r["details"]["keep_fraction"] for r in ffn} == {None, 0.05, 0.1, 0.2, 0.5, 1.0}
    assert all(set(r["peers_ms"]) == {"F.linear chain"} for r in ffn)
    assert [r["details"]["rows"] for r in linear] == [1, 8, 32]
    assert all(set(r["peers_ms"]) == {"F.linear"} for r in linear)
    rope = run("rope", tmp_path, "--context", "256")
    assert [r["kind"] for r in rope] == ["rope", "rope pages"]
    allocator = run("allocator", tmp_path, "--batch", "2")
    assert [r["kind"] for r in allocator] == ["append", "decode step", "admit", "release"]
    assert all(r["details"]["ns_per_row"] > 0 for r in allocator)


def test_ttft_compares_policies_on_the_ledger(tmp_path: Path) -> None:
    rows = {r["details"]["policy"]: r for r in run("ttft", tmp_path, "--context", "4096")}
    assert set(rows) == {"Hugging Face", *(name for name, _ in ttft.policies())}
    redknot = rows["redknot"]["details"]
    assert redknot["flops_ratio"] > 1.2
    assert rows["dense"]["details"]["flops_ratio"] == 1
    assert set(rows["redknot"]["peers_ms"]) == {"dense", "Hugging Face"}


def test_random_model_is_a_model() -> None:
    model = ttft.random_model(TINY, 2, Options(dtype="float32"))
    logits = model(torch.arange(8)[None]).logits
    assert logits.isfinite().all() and logits.std() > 1e-3


def test_useful_work_counts_visible_keys_alone() -> None:
    case = Case(TINY, "decode", "mixed", (4096, 100))
    assert case.global_heads.tolist() == [True, False, False, False]
    visible = 4096 + 3 * (1024 + 128) + 4 * 100  # sink and window of 3 heads; a short sequence
    assert case.flops == 4 * 32 * 2 * visible
    assert case.num_bytes(2) == 2 * 32 * (2 * visible + 2 * 2 * 8)
    prefill = Case(TINY, "prefill", "global", (64,))
    assert prefill.flops == 4 * 32 * 8 * 64 * 65 / 2


def test_local_rows_of_a_decode_hold_sink_and_window_alone() -> None:
    case = Case(TINY, "decode", "local", (4000,), window=256, sink=64)
    paged = build(case, Options(quick=True))[0]
    position = paged.page_refs[: int(paged.row_indptr[1]), 1]
    assert position.tolist() == [0, *range(3712, 4000, 64)]
    k, v = paged.contiguous(0, [0, 3])  # type: ignore[arg-type]
    assert k.shape == v.shape == (2, 64 + 256, 32)


def test_inputs_rotate() -> None:
    seen = []
    work = rotating(seen.append, [1, 2, 3])
    for _ in range(4):
        work()
    assert seen == [1, 2, 3, 1]
    case = Case(TINY, "decode", "global", (1024,))
    inputs = build(case, Options(quick=True))
    pages = [set(paged.page_refs[:, 0].tolist()) for paged in inputs]
    assert len(pages) > 1 and not pages[0] & pages[1]
    assert sum(map(len, pages)) * 2 * 64 * 32 * 2 >= options._QUICK_ROTATION_BYTES


def test_measure_takes_turns_and_sees_the_difference() -> None:
    order: list[str] = []

    def work(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    timings = measure({"": lambda: work("a", 0.002), "b": lambda: work("b", 0.01)}, seconds=0.1)
    assert order[:4] == ["a", "b", "a", "b"]
    assert timings[""].median >= 0.002 and timings["b"].median >= 0.01
    assert (ratio(timings[""], timings["b"]) or 3) > 2  # a busy machine may wake sleepers late


def test_a_ratio_that_means_nothing_is_not_given() -> None:
    own = Timing((1.0, 1.0, 1.0, 1.0))
    assert ratio(own, Timing((2.0, 2.1, 1.9, 2.0))) == pytest.approx(2.0)
    assert ratio(own, Timing((1.0, 4.0, 1.0, 4.0))) is None
    assert ratio(Timing((1.0, 1.0)), Timing((2.0, 2.0))) is None
    unsteady = Row("ffn", "-", "x", 1.0, 0.5, peers_ms={"peer": 2.0})
    assert cells([unsteady])[1][0][-1] == "unsteady"


@pytest.mark.parametrize("heads", ["global", "local"])
def test_flex_attention_computes_the_same(heads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.compile
    monkeypatch.setattr(  # Inductor takes half a minute
        torch,
        "compile",
        lambda work, **given: work if work is flex_attention else real(work, **given),
    )
    case = Case(TINY, "prefill", heads, (300,), window=64, sink=16)
    inputs = build(case, Options(quick=True, dtype="float32"))
    found = attention_peers.peers_of(case, inputs, Options(dtype="float32"))
    assert "FlexAttention" in {peer.name for peer in found}
    for peer in found:
        attention._check(peer, inputs[0])


def test_a_peer_that_computes_something_else_is_refused() -> None:
    case = Case(TINY, "decode", "global", (64,))
    paged = build(case, Options(quick=True))[0]
    wrong = Peer("wrong", lambda inputs: torch.flip(inputs.attend(), [1]), [paged], lambda out: out)
    with pytest.raises(RuntimeError, match=r"wrong and redknot differ .* decode global 8/4x32"):
        attention._check(wrong, paged)


def test_a_peer_that_cannot_do_a_case_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(inputs: object) -> torch.Tensor:
        raise RuntimeError("No available kernel. Aborting execution.\nand more")

    monkeypatch.setattr(
        attention, "peers_of", lambda case, inputs, _: [Peer("cuDNN", refuse, inputs, lambda x: x)]
    )
    case = Case(TINY, "decode", "global", (64,))
    row = attention._measure("Tiny", case, Options(quick=True), ROOFS)
    reason = "No available kernel. Aborting execution."
    assert row.details["peers_missing"] == {"cuDNN": reason}
    assert list(row.peers_ms) == ["bare reading"]
    assert f"decode global 8/4x32 1 x 64: no cuDNN: {reason}" in capsys.readouterr().err


# --- device="cuda", without one -------------------------------------------------------------------


class FakeEvent:
    """A clock of the device: what `_sleep` takes is not in the time between events."""

    log: ClassVar[list[str]] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.log.append("event")
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        self.log.append("wait")

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1e3 * (end.at - self.at)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The CPU under the name of a GPU: the order of what is asked of it."""
    monkeypatch.setattr(FakeEvent, "log", [])
    log = FakeEvent.log
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ops, "has_cuda_kernels", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda: SimpleNamespace(L2_cache_size=1 << 20)
    )
    return log


def test_on_cuda_calls_are_queued_before_they_are_timed(cuda: list[str]) -> None:
    timings = measure({"": lambda: cuda.append("call")}, seconds=1e-3, device="cuda")
    first = ["synchronize", "sleep", "event", "call", "event", "wait"]
    assert cuda[:12] == first * 2
    # Short calls are repeated between two events, no more of them than a queue takes.
    assert cuda[12:15] == first[:3] and cuda[15:35] == ["call"] * 20 and cuda[35] == "event"
    assert len(timings[""].samples) >= 3


@pytest.mark.parametrize("kind", ["prefill", "decode"])
@pytest.mark.parametrize("heads", ["global", "local", "mixed"])
def test_cuda_peers_compute_the_same(
    cuda: list[str], kind: str, heads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(TINY, kind, heads, (300,), window=64, sink=16)
    asked = Options(device="cuda", dtype="float32", skip_peers=("flex",))
    assert asked.rotation_bytes == 4 << 20
    inputs = build(case, Options(quick=True, dtype="float32"))[:2]
    inputs = [replace(paged, plan=paged.make_plan()) for paged in inputs]
    found = attention_peers.peers_of(case, inputs, asked)
    reasons = {peer.name: attention._check(peer, inputs[0]) for peer in found}
    expected = {
        ("prefill", "global"): "SDPA causal",
        ("decode", "global"): "SDPA",
    }.get((kind, heads), "folded SDPA" if kind == "decode" else "SDPA + mask")
    assert reasons[expected] == ""
    if expected != "SDPA + mask":
        backends = {f"{expected}, {name}" for name in ("flash", "cuDNN", "efficient", "math")}
        assert backends <= reasons.keys() and reasons[f"{expected}, math"] == ""
    assert attention._plan_time(inputs, asked)["plan_ms"] > 0


def test_roofline() -> None:
    assert ROOFS.fraction(5e11, 1e9, 1.0) == (0.5, "compute")
    assert ROOFS.fraction(1e9, 5e10, 1.0) == (0.5, "stream")
    calls = torch.ops.redknot._cpu_dot_roof(torch.zeros(1), 10)
    assert calls > 0 and calls == torch.ops.redknot._cpu_dot_roof(torch.zeros(1), 20) // 2
    with pytest.raises(RuntimeError, match="_cpu_dot_roof: num_rounds must not be negative"):
        torch.ops.redknot._cpu_dot_roof(torch.zeros(1), -1)


def test_long_tail() -> None:
    lengths = attention.long_tailed(8192)
    assert len(lengths) == 32 and max(lengths) == 8192 and sorted(lengths)[16] == 1024


def test_every_benchmark_says_what_it_measures() -> None:
    for name in BENCHES:
        module = bench_module(name)
        assert module.__doc__ and callable(module.run)


def test_fill_random_is_random_and_repeats() -> None:
    first = fill_random(torch.empty(3000), seed=1)
    assert 0.9 < first.std() < 1.1 and torch.equal(first, fill_random(torch.empty(3000), seed=1))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["speed"], "unknown benchmark 'speed'; known: attention, ffn"),
        (["rope", "--model", "GPT-2"], "--model must be one of Mistral-7B, Llama-3-8B"),
        (["rope", "--context", "0"], "--context must be at least 1, got 0"),
        (["rope", "--threads", "4096"], "--threads must be at most"),
        (["rope", "--threads", "-1"], "--threads must be at least 0, got -1"),
        (["rope", "--isa", "mmx"], "--isa must be default, avx2, avx512 or amx"),
        (["rope", "--dtype", "int8"], "--dtype must be one of bfloat16"),
        (["rope", "--device", "tpu"], "--device must be one of cpu, cuda"),
        (["rope", "--skip-peer", "xla"], "--skip-peer must be one of sdpa"),
        (["rope", "--plot", "rows.pdf"], "--plot must be a .png file, got 'rows.pdf'"),
        (["rope", "--json", "/no/such/rows.json"], "/no/such/rows.json: cannot write it: No such"),
        (["attention", "--vllm-cpu", "none.so"], "--vllm-cpu must be vLLM's _C_*.abi3.so"),
    ],
)
def test_bad_input_is_one_line(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *args]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err


def test_a_library_that_is_not_vllms_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library = tmp_path / "_C.abi3.so"
    library.write_bytes(b"no library")
    assert main(["bench", "attention", "--quick", "--model", "Tiny", "--context", "64",
                 "--skip-peer", "flex", "--vllm-cpu", str(library)]) == 2  # fmt: skip
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "cannot be used" in err


def test_threads_and_instruction_set_are_put_back() -> None:
    before = torch.get_num_threads(), torch.ops.redknot._cpu_isa("")
    with options.use_threads(1), options.chosen_isa("default"):
        assert torch.get_num_threads() == 1 and torch.ops.redknot._cpu_isa("") == "default"
    assert (torch.get_num_threads(), torch.ops.redknot._cpu_isa("")) == before
    with pytest.raises(InputError), options.chosen_isa("mmx"):
        pass
