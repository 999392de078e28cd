"""How a prompt is put together: BOS, prefix, chat template, separators."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from redknot import InputError
from redknot.engine.prompt import PromptFormat

CONFIG = SimpleNamespace(vocab_size=256, bos_token_id=1)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer():
    """One token per character, so that no split can change the tokens."""
    vocabulary = {chr(i): i for i in range(128)} | {"[BOS]": 200}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="[BOS]", unk_token="?")


def test_bos_alone_is_the_default_prefix(tokenizer):
    assert PromptFormat(tokenizer, CONFIG).prefix_ids.tolist() == [200]
    assert PromptFormat(None, CONFIG).prefix_ids.tolist() == [1]
    no_bos = SimpleNamespace(vocab_size=256, bos_token_id=None)
    assert PromptFormat(None, no_bos).prefix_ids.tolist() == []


def test_text_prefix_gets_the_bos_and_ids_are_taken_as_they_are(tokenizer):
    assert PromptFormat(tokenizer, CONFIG, prefix="ab").prefix_ids.tolist() == [200, 97, 98]
    assert PromptFormat(tokenizer, CONFIG, prefix=[5, 6]).prefix_ids.tolist() == [5, 6]
    assert PromptFormat(tokenizer, CONFIG, prefix=[]).prefix_ids.tolist() == []


@pytest.mark.parametrize("system", [None, "be kind"])
def test_the_chat_template_is_split_around_the_documents(tokenizer, system):
    tokenizer.chat_template = TEMPLATE
    form = PromptFormat(tokenizer, CONFIG, prefix=system)
    parts = [form.prefix_ids, form.document_ids("one."), form.document_ids("two."),
             form.question_ids("why?")]  # fmt: skip
    messages = [{"role": "user", "content": "one.\n\ntwo.\n\nwhy?"}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = tokenizer(text, add_special_tokens=False).input_ids
    assert np.concatenate(parts).tolist() == expected


def test_without_a_template_documents_stand_as_they_are(tokenizer):
    form = PromptFormat(tokenizer, CONFIG)
    assert form.document_ids("ab").tolist() == [97, 98]
    assert PromptFormat(tokenizer, CONFIG, separator="\n").document_ids("ab").tolist()[-1] == 10


def test_chat_can_be_switched_off(tokenizer):
    tokenizer.chat_template = TEMPLATE
    form = PromptFormat(tokenizer, CONFIG, chat=False, prefix="x")
    assert form.prefix_ids.tolist() == [200, 120]
    assert form.question_ids("y").tolist() == [121]


def test_refusals(tokenizer):
    with pytest.raises(InputError, match="no chat template"):
        PromptFormat(tokenizer, CONFIG, chat=True)
    tokenizer.chat_template = "nothing of what you said"
    with pytest.raises(InputError, match="chat=False"):
        PromptFormat(tokenizer, CONFIG)
    with pytest.raises(InputError, match="no tokenizer"):
        PromptFormat(None, CONFIG, prefix="text")


def test_ids_of_any_kind(tokenizer):
    form = PromptFormat(tokenizer, CONFIG)
    for ids in ([5, 6], np.array([5, 6], np.int32), torch.tensor([5, 6])):
        assert form.document_ids(ids).tolist() == [5, 6]
