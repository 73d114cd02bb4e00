"""From messages to token ids: one function for training and for serving, so that both see the same tokens.

The template is the tokenizer's own. What a person wrote is encoded as plain text: it can name a special token, but
never become one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypedDict
from weakref import WeakKeyDictionary

from tigerbot.errors import ModelError

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
TAGS = tuple(f"<|tag_{index}|>" for index in range(64))
_MAX_PARTS = 256
_PARTS: WeakKeyDictionary[Any, dict[Any, list[list[int] | int]]] = WeakKeyDictionary()
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
    parts = _template_parts(tokenizer, tuple(message["role"] for message in messages), generation_prompt)
    ids: list[int] = []
    loss: list[bool] = []
    after_assistant = False
    for part in parts:
        if isinstance(part, int):
            message = messages[part]
            new = encode_plain(tokenizer, message["content"])
            after_assistant = message["role"] == "assistant"
            flags = [after_assistant] * len(new)
        else:
            new = part
            flags = [False] * len(new)
            if after_assistant and new:
                flags[0] = True
        ids += new
        loss += flags
    return ids, loss


def encode_plain(tokenizer: Any, text: str) -> list[int]:
    """Token ids of text in which special tokens are only letters."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.truncation is None and backend.padding is None:
        # What the line below comes to, at a quarter of its time, which is most of a short request's.
        if not backend.encode_special_tokens:
            backend.encode_special_tokens = True
        return backend.encode(text, add_special_tokens=False).ids
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def _template_parts(tokenizer: Any, roles: tuple[str, ...], generation_prompt: bool) -> list[list[int] | int]:
    """The ids that a template writes around the messages, and between them the places of the messages.

    They follow from the roles, so that a server need not render them again; a template that asks for the date is.
    """
    template = tokenizer.chat_template
    known = _PARTS.setdefault(tokenizer, {})
    place = (template if isinstance(template, str) else str(template), roles, generation_prompt)
    if place in known:
        return known[place]
    marked = [{"role": role, "content": f"\ue000{index}\ue001"} for index, role in enumerate(roles)]
    text = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=generation_prompt)
    parts: list[list[int] | int] = [
        int(part) if index % 2 else tokenizer.encode(part, add_special_tokens=False)
        for index, part in enumerate(_PLACE.split(text))
    ]
    if "strftime_now" not in place[0]:
        if len(known) >= _MAX_PARTS:
            known.clear()
        known[place] = parts
    return parts


def end_token_ids(tokenizer: Any) -> list[int]:
    """Ids that end an assistant's turn."""
    names = ("<|end|>", "<|im_end|>", "<|eot_id|>", tokenizer.eos_token)
    known = tokenizer.get_vocab()
    return sorted({known[name] for name in names if name in known})
