"""What `redknot eval` prints: the rows of a report as tables."""

from __future__ import annotations

from typing import Any

from redknot.cli.output import bytes_text, table

__all__ = ["report_text"]


def report_text(report: dict[str, Any], complete: bool) -> str:
    """Tables of quality and of costs for every task and length, and what to know of them."""
    groups: dict[int, dict[str, list[dict[str, Any]]]] = {}
    for row in report["rows"]:
        groups.setdefault(row["length"], {}).setdefault(row["task"], []).append(row)
    lines = []
    for length, tasks in groups.items():
        for task, rows in tasks.items():
            lines += _task_lines(task, length, rows)
        lines += _cost_lines(length, next(iter(tasks.values())))
    lines += [
        "[..]: 95 % intervals; the difference's is paired, over the same questions. agree: answer",
        "tokens as dense's; KL: to dense, of the first answer token. (control): must fail where",
        "an answer needs two documents.",
    ]
    for label, (same, of) in report["shared_equals_alone"].items():
        if same < of:
            lines.append(
                f"{label}: {of - same} of {of} questions asked alone gave other tokens than in "
                "the run that shares the documents' recovery"
            )
    if not complete:
        lines.append("interrupted: the same command continues with the prompts that are missing")
    return "\n".join(lines)


def _task_lines(task: str, length: int, rows: list[dict[str, Any]]) -> list[str]:
    """One table of quality."""
    header = ["policy", "score [95 %]", "minus dense [95 %]", "agree", "KL"]
    if rows[0]["kl_minus_redknot"] is not None:
        header.append("minus redknot's [95 %]")
    left_out = rows[0]["prompts_left_out"]
    reasons = dict.fromkeys(row["not_gated_because"] for row in rows if not row["control"])
    return [
        f"{task}, {length} tokens: {rows[0]['n']} questions on {rows[0]['num_prompts']} prompts"
        + (f"; {left_out} prompts are longer than the context" if left_out else ""),
        table(header, [_quality_cells(row, number == 0) for number, row in enumerate(rows)]),
        *(f"* no claim rests on this: {reason}" for reason in reasons if reason),
        "",
    ]


def _name(row: dict[str, Any]) -> str:
    return row["policy"] + (" (control)" if row["control"] else "")


def _quality_cells(row: dict[str, Any], is_dense: bool) -> list[str]:
    low, high = row["ci"]
    below, above = row["delta_ci"]
    cells = [
        _name(row) + ("" if row["gated"] or row["control"] else " *"),
        f"{row['score']:.3f} [{low:.3f}, {high:.3f}]",
        "" if is_dense else f"{row['delta']:+.3f} [{below:+.3f}, {above:+.3f}]",
        f"{row['token_agreement']:.3f}",
        f"{row['kl']:.2g}",
    ]
    if row["kl_minus_redknot"] is not None:
        low, high = row["kl_minus_redknot_ci"]
        cells.append(
            "" if is_dense else f"{row['kl_minus_redknot']:+.2g} [{low:+.2g}, {high:+.2g}]"
        )
    return cells


def _cost_lines(length: int, rows: list[dict[str, Any]]) -> list[str]:
    """The table of what a request costs."""
    if not rows[0]["num_measured"]:
        return []
    header = ["policy", "rows", "heads", "FFN rows", "FLOPs saved", "KV held", "smaller", "TTFT",
              "faster"]  # fmt: skip
    cells = [
        [
            _name(row),
            f"{row['rows_recomputed']:.1%}",
            f"{row['heads_refreshed']:.0%}",
            f"{row['ffn_rows']:.1%}",
            f"{row['flops_saved']:.1%}",
            bytes_text(row["kv_bytes"]),
            f"{row['kv_ratio']:.2f}x",
            f"{1e3 * row['ttft_seconds']:.1f} ms",
            f"{row['ttft_ratio']:.2f}x",
        ]
        for row in rows
    ]
    return [
        f"costs, {length} tokens: {rows[0]['num_measured']} requests of one question each, "
        "documents cached",
        table(header, cells),
        "rows, heads: share of the documents' that is computed anew; TTFT: median",
        "",
    ]
