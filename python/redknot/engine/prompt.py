"""Text to token ids: prefix, documents and question, split around the documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from redknot.errors import InputError

__all__ = ["PromptFormat", "TextOrIds"]

TextOrIds: TypeAlias = "str | Sequence[int] | np.ndarray | torch.Tensor"

# Stands in for the documents and the question while a chat template is rendered. Letters alone,
# so that no template escapes or strips them.
_DOCUMENTS = "REDKNOTDOCUMENTSHERE"
_QUESTION = "REDKNOTQUESTIONHERE"


class PromptFormat:
    """How a prompt is put together: prefix + documents + question.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase, optional
        Needed for text; token ids pass without one.
    config : PretrainedConfig
        The model's, for its vocabulary and BOS.
    prefix : str or token ids, optional
        System prompt. Default: the model's BOS alone. Text gets the BOS in front, ids are taken
        as they are.
    chat : bool, optional
        Render prefix and question with the tokenizer's chat template, split around the documents,
        so that an instruct model sees the prompt it was trained on. Default: where the tokenizer
        has a template and the prefix is not given as ids.
    separator : str, optional
        Text between documents. Default: a blank line in a chat prompt, nothing otherwise.
    """

    def __init__(
        self,
        tokenizer: Any,
        config: Any,
        *,
        prefix: TextOrIds | None = None,
        chat: bool | None = None,
        separator: str | None = None,
    ) -> None:
        if tokenizer is not None and not callable(tokenizer):
            raise InputError(f"tokenizer must be one of transformers, got {tokenizer!r}")
        self.tokenizer = tokenizer
        self._vocab_size = config.vocab_size
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if chat and not has_template:
            raise InputError("chat=True, but the tokenizer has no chat template")
        if chat and prefix is not None and not isinstance(prefix, str):
            raise InputError("chat=True takes the prefix as text, got token ids")
        prefix_is_text = prefix is None or isinstance(prefix, str)
        self.chat = (has_template and prefix_is_text) if chat is None else chat
        self.separator = separator if separator is not None else ("\n\n" if self.chat else "")
        self._question_head, self._question_tail = "", ""
        if self.chat:
            self.prefix_ids = self._split_template(prefix if isinstance(prefix, str) else "")
        elif isinstance(prefix, str):
            self.prefix_ids = np.concatenate([self._bos(config), self._encode("prefix", prefix)])
        elif prefix is not None:
            self.prefix_ids = self._checked_ids("prefix", prefix)
        else:
            self.prefix_ids = self._bos(config)

    def document_ids(self, document: TextOrIds) -> np.ndarray:
        """Token ids [num_tokens] int64 of a document; text gets the separator behind it."""
        if isinstance(document, str):
            if not document.strip():
                raise InputError("the document is empty; a document needs at least one token")
            ids = self._encode("document", document + self.separator)
        else:
            ids = self._checked_ids("document", document)
        if not len(ids):
            raise InputError("the document is empty; a document needs at least one token")
        return ids

    def question_ids(self, question: TextOrIds) -> np.ndarray:
        """Token ids [num_tokens] int64 of a question, inside the chat template if there is one."""
        if isinstance(question, str):
            text = self._question_head + question + self._question_tail
            ids = self._encode("question", text)
        else:
            ids = self._checked_ids("question", question)
        if not len(ids):
            raise InputError("the question is empty; a prompt needs at least one token to answer")
        return ids

    def _split_template(self, system: str) -> np.ndarray:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": _DOCUMENTS + _QUESTION})
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        head, found, rest = text.partition(_DOCUMENTS)
        self._question_head, found_question, self._question_tail = rest.partition(_QUESTION)
        if not found or not found_question:
            raise InputError(
                "the chat template does not carry the user's message through; pass chat=False"
            )
        return self._encode("prefix", head)

    def _bos(self, config: Any) -> np.ndarray:
        bos = getattr(self.tokenizer, "bos_token_id", None)
        if self.tokenizer is None:
            bos = getattr(config, "bos_token_id", None)
        return np.array([] if bos is None else [bos], dtype=np.int64)

    def _encode(self, what: str, text: str) -> np.ndarray:
        if self.tokenizer is None:
            raise InputError(
                f"the {what} is text, but there is no tokenizer; pass token ids or tokenizer="
            )
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return np.asarray(ids, dtype=np.int64)

    def _checked_ids(self, what: str, ids: Sequence[int] | np.ndarray | torch.Tensor) -> np.ndarray:
        if isinstance(ids, torch.Tensor):
            ids = ids.cpu().numpy()
        array = np.asarray(ids)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise InputError(
                f"the {what} must be text or a list of token ids, "
                f"got {array.dtype} of shape {list(array.shape)}"
            )
        array = array.astype(np.int64)
        if array.size and not 0 <= array.min() <= array.max() < self._vocab_size:
            raise InputError(
                f"the {what} has a token id outside the vocabulary of {self._vocab_size}: "
                f"{int(array.min()) if array.min() < 0 else int(array.max())}"
            )
        return array
