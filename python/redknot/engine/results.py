"""What a request returns: logits or text, times, the ledger, and an explanation of every reuse."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor

from redknot.recovery import Ledger

__all__ = ["DocumentReport", "Explanation", "Generation", "LiveRange", "Prefill"]


@dataclass(frozen=True)
class LiveRange:
    """Rows of a document that passed attention and FFN in the layers [begin_layer, end_layer).

    `positions` are half-open runs of true positions, `num_rows` of them in all.
    """

    begin_layer: int
    end_layer: int
    num_rows: int
    positions: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        return f"{self.num_rows} rows in layers {self.begin_layer}-{self.end_layer - 1}"


@dataclass(frozen=True)
class DocumentReport:
    """What happened to one document of a prompt.

    Attributes
    ----------
    id : str
        As `Engine.add` returned it.
    begin, end : int
        Its true positions, half open.
    source : {"cached", "loaded", "computed", "shared", "not used"}
        Whether its K/V were in the page pool, came from another tier, had to be computed for this
        request, are those that an earlier request recovered behind the same documents, or were not
        asked for.
    reason : str
        Why, in a sentence.
    moved_by : int
        True position minus the position it was cached at.
    heads_reused, heads_refreshed : int
        (layer, KV head) pairs whose K/V of this document are the cached ones, or were replaced.
    rows_recomputed : int
        The most tokens whose hidden state was carried through one layer.
    live : tuple of LiveRange
        Which rows lived, where; ascending by layer.
    why : str
        Why these; empty when none did.
    """

    id: str
    begin: int
    end: int
    source: str
    reason: str
    moved_by: int
    heads_reused: int
    heads_refreshed: int
    rows_recomputed: int
    live: tuple[LiveRange, ...]
    why: str

    def __str__(self) -> str:
        return (
            f"{self.id}  tokens {self.begin}-{self.end}  {self.source}: {self.reason}; "
            f"heads reused {self.heads_reused}, refreshed {self.heads_refreshed}; {self._rows()}"
        )

    def _rows(self) -> str:
        """What lived, in words."""
        if not self.live:
            return "0 rows recomputed"
        ranges = ", ".join(str(item) for item in self.live)
        return f"{self.rows_recomputed} rows recomputed ({ranges}): {self.why}"


@dataclass(frozen=True)
class Explanation:
    """Why a request cost what it cost.

    Attributes
    ----------
    policy : str
        Name of the policy.
    prefix_tokens, question_tokens : int
        Tokens in front of and behind the documents.
    documents : tuple of DocumentReport
        In the order of the prompt.
    kv_bytes : int
        Bytes of the pages that the session references after prefill, shared ones included.
    private_kv_bytes : int
        Bytes of those that no other session or segment holds.
    """

    policy: str
    prefix_tokens: int
    question_tokens: int
    documents: tuple[DocumentReport, ...]
    kv_bytes: int
    private_kv_bytes: int

    def to_dict(self) -> dict[str, object]:
        """All of it as plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"policy {self.policy}: prefix {self.prefix_tokens} tokens, "
            f"{len(self.documents)} documents, question {self.question_tokens} tokens; "
            f"holds {self.kv_bytes:,} bytes of KV, {self.private_kv_bytes:,} of them alone"
        ]
        return "\n".join(lines + [f"  {document}" for document in self.documents])


@dataclass(frozen=True)
class Prefill:
    """Result of `Engine.prefill`.

    Attributes
    ----------
    logits : Tensor
        Of the last token, [vocab_size], in the model's dtype.
    token_ids : list of int
        The whole prompt: prefix, documents, question.
    ttft_seconds : float
        From the request to these logits, misses included.
    ledger : Ledger
        FLOPs of the very same computation.
    kv_bytes : int
        Bytes of the pages that the session references after prefill.
    """

    logits: Tensor
    token_ids: list[int]
    ttft_seconds: float
    ledger: Ledger
    kv_bytes: int
    explanation: Explanation

    def explain(self) -> Explanation:
        """What was reused, recomputed or missed, and why."""
        return self.explanation


@dataclass(frozen=True)
class Generation:
    """Result of `Engine.generate`.

    Attributes
    ----------
    text : str
        The answer, without special tokens and without the stop string; empty without a tokenizer.
    token_ids : list of int
        Generated tokens, the end-of-sequence token included if one came.
    prompt_token_ids : list of int
        Prefix, documents, question.
    finish_reason : {"eos", "stop", "length"}
        End of sequence, a stop string, or max_new_tokens.
    ttft_seconds : float
        From the request to the first token's logits, misses included.
    seconds_per_token : float
        Mean time of the decode steps after the first token (0.0 if there were none).
    ledger : Ledger
        FLOPs of the prefill.
    kv_bytes : int
        Bytes of the pages that the session references after prefill.
    first_logits : Tensor
        [vocab_size], of which the first token was chosen.
    queued_seconds : float
        From submission to the beginning of the prefill, while others held the pool.
    num_preemptions : int
        How often it was swapped out to host memory, and back.
    retrieval_page_share : float or None
        Share of their pages that retrieval heads read while decoding; None without such heads.
    """

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: str
    ttft_seconds: float
    seconds_per_token: float
    ledger: Ledger
    kv_bytes: int
    explanation: Explanation
    first_logits: Tensor
    queued_seconds: float = 0.0
    num_preemptions: int = 0
    retrieval_page_share: float | None = None

    def explain(self) -> Explanation:
        """What was reused, recomputed or missed, and why."""
        return self.explanation
