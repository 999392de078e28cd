"""Which document rows a prefill carries: sets of the plan, and what a pick keeps of them.

Everything is a tensor of positions on the model's device. The host knows how many rows live at any
time, but after a pick no longer which: nothing ever waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from redknot.models.decoder import Decoder
from redknot.recovery import Pick, PromptLayout, RecoveryPlan

__all__ = ["LiveRows", "Prompt", "part_of"]

_MOST_READERS = 256  # so that what rows read costs no more than linear time


@dataclass(frozen=True)
class Prompt:
    """A prompt as the runner needs it: tokens and layout by true position, and the plan.

    `hidden` are the stored hidden states [num_tokens, hidden_dim] of each document of the layout,
    where the plan lets rows enter from them.
    """

    token_ids: np.ndarray
    layout: PromptLayout
    plan: RecoveryPlan
    hidden: Sequence[Tensor | None] = ()

    def key_positions(self) -> np.ndarray:
        """Position each token's key is rotated at: its home in its own document."""
        positions = np.arange(len(self.token_ids))
        for document in self.layout.documents:
            positions[document.begin : document.end] -= document.offset
        return positions

    def hidden_of(self, positions: np.ndarray) -> Tensor:
        """Stored hidden states [len(positions), hidden_dim] of document rows, by true position."""
        parts = []
        for document, hidden in zip(self.layout.documents, self.hidden, strict=True):
            wanted = positions[np.searchsorted(positions, document.begin) :]
            wanted = wanted[: np.searchsorted(wanted, document.end)]
            if not len(wanted):
                continue
            assert hidden is not None  # the policy's entry_layer asked for it
            if len(wanted) < len(hidden):
                hidden = hidden[torch.from_numpy(wanted - document.begin).to(hidden.device)]
            parts.append(hidden)
        return torch.cat(parts)


def part_of(index: slice | Tensor, chunk: slice) -> slice | Tensor:
    """Some of the rows that `LiveRows.index_of` names."""
    if isinstance(index, Tensor):
        return index[chunk]
    return slice(index.start + chunk.start, index.start + chunk.stop)


class LiveRows:
    """The rows that a prefill carries at the moment: documents' rows, then the query's.

    Attributes
    ----------
    positions : Tensor [num_rows], int64
        True positions, ascending.
    num_documents : int
        How many of them are rows of documents.
    q_positions : Tensor [num_rows], int32
        The same, for the attention.
    home_positions : Tensor [num_rows], int32
        Where their keys are rotated at: their homes in their own documents.
    foreign : Tensor [num_rows], fp32, or None
        What global heads have brought in from other segments so far, if anyone asked.
    """

    def __init__(self, prompt: Prompt, decoder: Decoder) -> None:
        self._prompt, self._decoder = prompt, decoder
        self._device = decoder.device
        self._tensors: dict[int, Tensor] = {}  # of the plan's arrays, which outlive this object
        self._picked: dict[int, Tensor] = {}  # what picks kept, by the plan's array
        self._ranks: dict[int, Tensor] = {}  # where that stands in the array
        self._always: np.ndarray | None = None  # of the picks so far
        self._token_ids = self._index(prompt.token_ids)
        self._query = self._index(prompt.layout.query_positions)
        self.key_positions = torch.from_numpy(prompt.key_positions()).int().to(self._device)
        self.foreign: Tensor | None = None

    def _index(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device, torch.int64)

    def _carry(self, documents: Tensor) -> None:
        self.documents = documents
        self.num_documents = len(documents)
        self.positions = torch.cat([documents, self._query]) if len(documents) else self._query
        self.q_positions = self.positions.int()
        self.home_positions = self.key_positions[self.positions]

    # --- sets of the plan ------------------------------------------------------------------------

    def tensor(self, rows: np.ndarray) -> Tensor:
        """Positions of a set as the plan has it, int64 on the device."""
        if id(rows) not in self._tensors:
            self._tensors[id(rows)] = self._index(rows)
        return self._tensors[id(rows)]

    def now(self, rows: np.ndarray) -> Tensor:
        """What a set of the plan stands for now: all of it, or what a pick kept."""
        if id(rows) in self._picked:
            return self._picked[id(rows)]
        assert self._always is None or len(rows) <= len(self._always)
        return self.tensor(rows)

    def rank(self, rows: np.ndarray) -> Tensor | None:
        """Where what is left of a set stands in it as the plan has it; None: it is all there."""
        return self._ranks.get(id(rows))

    # --- what changes them -----------------------------------------------------------------------

    def begin(self, rows: np.ndarray) -> Tensor:
        """Carry the set `rows` and the query; returns their embeddings [num_rows, hidden_dim]."""
        self._carry(self.now(rows))
        return self._decoder.embed(self._token_ids[self.positions])

    def move(self, rows: np.ndarray, hidden: Tensor, layer: int) -> Tensor:
        """Carry the set `rows` from `layer` on: drop what is not in it, let the others enter.

        Returns `hidden` [num_rows, hidden_dim] for the new rows.
        """
        documents, num_before = self.now(rows), self.num_documents
        if len(documents) == num_before:
            return hidden
        if len(documents) > num_before:
            return self._enter(rows, documents, hidden, layer)
        index = self.index_of(documents)
        self._carry(documents)
        if self.foreign is not None:
            self.foreign = self.foreign[index]
        return hidden[index]

    def index_of(self, documents: Tensor) -> slice | Tensor:
        """Where some of the carried document rows, and the query's, stand among the carried."""
        num_documents = self.num_documents
        if len(documents) in (0, num_documents):
            return slice(num_documents - len(documents), None)
        chosen = torch.searchsorted(self.documents, documents)
        query = torch.arange(num_documents, len(self.positions), device=self._device)
        return torch.cat([chosen, query])

    def stored(self, rows: np.ndarray, layer: int) -> Tensor:
        """Hidden states [len(rows), hidden_dim] of document rows as they enter `layer`.

        The embeddings in layer 0; later those that the offline pass has stored.
        """
        if layer == 0:
            return self._decoder.embed(self._token_ids[self._index(rows)])
        return self._prompt.hidden_of(rows)

    def _enter(self, rows: np.ndarray, documents: Tensor, hidden: Tensor, layer: int) -> Tensor:
        before, num_before = self.positions, self.num_documents
        if layer == 0:
            entered = self._decoder.embed(self._token_ids[documents])
        elif documents.device.type == "cpu":
            entered = self.stored(documents.numpy(), layer)
        else:  # the host does not know which rows were picked
            entered = self.stored(rows, layer)
            rank = self.rank(rows)
            entered = entered if rank is None else entered[rank]
        # Those that are carried already keep what they have.
        stay = torch.searchsorted(documents, before[:num_before])
        entered.index_copy_(0, stay, hidden[:num_before])
        self._carry(documents)
        if self.foreign is not None:  # nothing yet for those that enter
            stay = torch.searchsorted(self.positions, before)
            foreign = self.foreign.new_zeros(len(self.positions))
            self.foreign = foreign.index_copy(0, stay, self.foreign)
        return torch.cat([entered, hidden[num_before:]])

    def pick(
        self,
        pick: Pick,
        rows: np.ndarray,
        importance: Tensor,
        read_by: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Decide what `rows` stands for from now on; `importance` [len(rows)], larger is kept.

        Of a set that holds what an earlier pick kept, all of that is kept again. `read_by` says how
        much rows of the set, given by index, read of each [len(rows)].
        """
        always = list(self._picked.values())[-1] if self._picked else self.tensor(pick.always)
        if len(always):
            index = torch.searchsorted(self.tensor(rows), always)
            importance = importance.index_fill(0, index, torch.inf)
        chosen = importance.topk(pick.keep + len(always)).indices
        if pick.read:
            assert read_by is not None
            readers = chosen[len(always) :][:_MOST_READERS]  # by importance
            read = read_by(readers).index_fill(0, chosen, -torch.inf)
            chosen = torch.cat([chosen, read.topk(pick.read).indices])
        self._ranks[id(rows)] = chosen.sort().values
        self._picked[id(rows)] = self.tensor(rows)[self._ranks[id(rows)]]
        self._always = pick.always
