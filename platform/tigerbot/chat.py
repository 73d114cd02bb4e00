"""From messages to token ids: one function for training and for serving, so that both see the same tokens.

The template is the tokenizer's own. What a person wrote is encoded as plain text: it can name a special token, but
never become one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypedDict

from tigerbot.errors import ModelError

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
TAGS = tuple(f"<|tag_{index}|>" for index in range(64))
_PLACE = re.compile("\ue000(\\d+)\ue001")  # private-use characters: no template writes them


class Message(TypedDict):
    role: str
    content: str


def encode_chat(
    tokenizer: Any, messages: Sequence[Message], *, generation_prompt: bool = False
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them carry loss: assistant turns and the token that ends them.

    Raises:
        ModelError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            "has no chat template", where=str(tokenizer.name_or_path), fix="use an instruction-tuned model"
        )
    marked = [{"role": m["role"], "content": f"\ue000{i}\ue001"} for i, m in enumerate(messages)]
    text = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=generation_prompt)
    ids: list[int] = []
    loss: list[bool] = []
    after_assistant = False
    for index, part in enumerate(_PLACE.split(text)):
        if index % 2:
            message = messages[int(part)]
            new = encode_plain(tokenizer, message["content"])
            after_assistant = message["role"] == "assistant"
            flags = [after_assistant] * len(new)
        else:
            new = tokenizer.encode(part, add_special_tokens=False)
            flags = [False] * len(new)
            if after_assistant and new:
                flags[0] = True
        ids += new
        loss += flags
    return ids, loss


def encode_plain(tokenizer: Any, text: str) -> list[int]:
    """Token ids of text in which special tokens are only letters."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def end_token_ids(tokenizer: Any) -> list[int]:
    """Ids that end an assistant's turn."""
    names = ("<|end|>", "<|im_end|>", "<|eot_id|>", tokenizer.eos_token)
    known = tokenizer.get_vocab()
    return sorted({known[name] for name in names if name in known})
