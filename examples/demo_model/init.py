"""A starting point from which induction is learned in minutes: stock Llama weights, arranged.

Random weights need tens of millions of tokens before a head learns to match contents across a
prompt. Here the weights start with the *ingredients* of matching, and training decides which of
them are used and for what:

* the last residual dimension holds a constant, so that a head can prefer a distance: constant
  queries and keys leave the rotary phase alone to decide;
* in layer 0 three heads look 1, 2 and 3 tokens back and copy a 15-dimensional random code of what
  they see into three spare blocks of the residual stream;
* in every later layer some heads *match*: keys read the code of the token 1, 2 or 3 back, queries
  read another such code, values carry a random projection of the token itself. Which heads, and
  which of the nine (query, key) pairs, is dealt at random from shuffled decks;
* all other heads start with a preference for recent tokens.

Nothing marks the heads that will matter: most matching heads match something useless.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

CODE_DIM = 15
DISTANCES = (1, 2, 3)
DISTANCE_GAIN = 5.0  # sharp: the heads of layer 0 that look back
FAST_PAIRS = 6  # rotary pairs that turn visibly from one token to the next
RECENCY_GAIN = 1.6  # soft: heads that merely prefer recent tokens
CODE_GAIN = 0.12
MATCH_GAIN = 2.0
MATCH_OUTPUT_GAIN = 0.06


class Arranger:
    """Arranges the weights of one model; every random choice comes from one generator."""

    def __init__(self, model: LlamaForCausalLM, seed: int, num_matching: int) -> None:
        config = model.config
        if config.num_attention_heads != config.num_key_value_heads:
            raise ValueError("Arranger: expected one query head per KV head")
        self.layers = [layer.self_attn for layer in model.model.layers]
        self.mlps = [layer.mlp for layer in model.model.layers]
        self.embedding = model.model.embed_tokens.weight
        self.num_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.std = config.initializer_range
        self.num_matching = num_matching
        self.generator = torch.Generator().manual_seed(1000 + seed)
        # Residual stream: token dimensions, one block of codes per distance, the constant.
        self.constant = config.hidden_size - 1
        self.token_dim = self.constant - len(DISTANCES) * CODE_DIM
        self.block = {
            distance: slice(self.token_dim + i * CODE_DIM, self.token_dim + (i + 1) * CODE_DIM)
            for i, distance in enumerate(DISTANCES)
        }
        half = self.head_dim // 2
        theta = config.rope_parameters["rope_theta"]
        self.frequencies = theta ** -(torch.arange(half).float() / half)
        self.code = self._orthonormal(CODE_DIM)

    @torch.no_grad()
    def arrange(self) -> None:
        # Equally long rows give the constant one size behind the first norm; equally long codes
        # let every word match as well as any other (else the faintest names are never found).
        words = self.embedding[:, : self.token_dim]
        coded = words @ self.code.T @ self.code
        rest = self.token_dim - CODE_DIM
        words = F.normalize(coded) * CODE_DIM**0.5 + F.normalize(words - coded) * rest**0.5
        self.embedding[:, : self.token_dim] = self.std * words
        self.embedding[:, self.token_dim :] = 0
        self.embedding[:, self.constant] = 2 * self.std
        for attention, mlp in zip(self.layers, self.mlps, strict=True):
            for written in (attention.o_proj.weight, mlp.down_proj.weight):
                written.mul_(0.05)
                written[self.token_dim :] = 0  # nobody else writes into the spare dimensions
        looking_back = self._permutation(self.num_heads)[: len(DISTANCES)]
        for distance, head in zip(DISTANCES, looking_back, strict=True):
            self._look_back(head, distance)
        for head in range(self.num_heads):
            if head not in looking_back:
                self._prefer_recent(0, head)
        deck: list[tuple[int, int]] = []
        for layer in range(1, len(self.layers)):
            matching = self._permutation(self.num_heads)[: self.num_matching]
            for head in range(self.num_heads):
                if head not in matching:
                    self._prefer_recent(layer, head)
                    continue
                if not deck:
                    pairs = [(query, key) for query in DISTANCES for key in DISTANCES]
                    deck = [pairs[i] for i in self._permutation(len(pairs))]
                query, key = deck.pop()
                self._match(layer, head, query, key)

    def _permutation(self, n: int) -> list[int]:
        return torch.randperm(n, generator=self.generator).tolist()

    def _orthonormal(self, rows: int) -> Tensor:
        """Orthonormal rows [rows, token_dim]."""
        gaussian = torch.randn(self.token_dim, rows, generator=self.generator)
        return torch.linalg.qr(gaussian)[0].T.contiguous()

    def _rows(self, head: int) -> slice:
        return slice(head * self.head_dim, (head + 1) * self.head_dim)

    def _look_back(self, head: int, distance: int) -> None:
        """Layer 0: attend `distance` tokens back and write the code of what stands there."""
        attention, rows, half = self.layers[0], self._rows(head), self.head_dim // 2
        q, k, v = (p.weight[rows] for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        q.zero_()
        k.zero_()
        v.zero_()
        turn = distance * self.frequencies[:FAST_PAIRS]
        k[:FAST_PAIRS, self.constant] = DISTANCE_GAIN
        q[:FAST_PAIRS, self.constant] = DISTANCE_GAIN * torch.cos(turn)
        q[half : half + FAST_PAIRS, self.constant] = -DISTANCE_GAIN * torch.sin(turn)
        v[:CODE_DIM, : self.token_dim] = self.code
        attention.o_proj.weight[:, rows] = 0
        attention.o_proj.weight[self.block[distance], rows][:, :CODE_DIM].fill_diagonal_(CODE_GAIN)

    def _prefer_recent(self, layer: int, head: int) -> None:
        """Add a constant query-key product in the fast rotary pairs; how fast varies by head."""
        attention, rows = self.layers[layer], self._rows(head)
        fast = slice(rows.start + 1 + head % 3, rows.start + FAST_PAIRS)
        attention.q_proj.weight[fast, self.constant] += RECENCY_GAIN
        attention.k_proj.weight[fast, self.constant] += RECENCY_GAIN

    def _match(self, layer: int, head: int, query: int, key: int) -> None:
        """Attend where the code `key` tokens back equals our own code `query` tokens back."""
        attention, rows, half = self.layers[layer], self._rows(head), self.head_dim // 2
        q, k, v = (p.weight[rows] for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        q.zero_()
        k.zero_()
        # The slow rotary pairs hardly turn within a prompt: contents can be compared there.
        slow = torch.cat([torch.arange(half // 2, half), torch.arange(half + half // 2, 2 * half)])
        for i in range(CODE_DIM):
            k[slow[i], self.block[key].start + i] = MATCH_GAIN
            q[slow[i], self.block[query].start + i] = MATCH_GAIN
        carried = self._orthonormal(self.head_dim)
        v.zero_()
        v[:, : self.token_dim] = carried
        attention.o_proj.weight[:, rows] = 0
        attention.o_proj.weight[: self.token_dim, rows] = MATCH_OUTPUT_GAIN * carried.T
