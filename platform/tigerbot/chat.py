"""From messages to token ids: one function for training and for serving, so that both see the same tokens.

The template is the tokenizer's own. What a person wrote is encoded as plain text: it can name a special token, but
never become one. That holds for messages, and for the names, descriptions and arguments of tools.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict

from jinja2 import TemplateError

from tigerbot.errors import InputError, ModelError

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
TAGS = tuple(f"<|tag_{index}|>" for index in range(64))
_PLACE = re.compile("\ue000(\\d+)\ue001")  # private-use characters: no template writes them


class Message(TypedDict):
    """A turn. `tool_calls`, `tool_call_id` and `name` are for templates that take tools."""

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


def encode_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    generation_prompt: bool = False,
    tools: Sequence[dict[str, Any]] = (),
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them carry loss: assistant turns and the token that ends them.

    Args:
        tools: function definitions in OpenAI's shape, for a template that takes them (see `takes_tools`).

    Raises:
        ModelError: the tokenizer has no chat template.
        InputError: the template refuses these messages.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            "has no chat template", where=str(tokenizer.name_or_path), fix="use an instruction-tuned model"
        )
    written = _Written(tokenizer)
    marked = [written.message(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            marked,
            tools=[written.shielded(tool) for tool in tools] or None,
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )
    except TemplateError as error:
        raise InputError(f"the chat template refuses them: {error}", where="messages", fix="change them") from None
    ids: list[int] = []
    loss: list[bool] = []
    after_assistant = False
    for index, part in enumerate(_PLACE.split(text)):
        if index % 2:
            plain, role = written.pieces[int(part)]
            new = encode_plain(tokenizer, plain)
            after_assistant = role == "assistant" if role else after_assistant
            flags = [role == "assistant"] * len(new)
        else:
            new = tokenizer.encode(part, add_special_tokens=False)
            flags = [False] * len(new)
            if after_assistant and new:
                flags[0] = True
        ids += new
        loss += flags
    return ids, loss


def takes_tools(tokenizer: Any) -> bool:
    """Whether the chat template renders tools, their calls and their answers."""
    template = tokenizer.chat_template
    return any("tools" in one for one in (template.values() if isinstance(template, dict) else [template or ""]))


def encode_plain(tokenizer: Any, text: str) -> list[int]:
    """Token ids of text in which special tokens are only letters."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def end_token_ids(tokenizer: Any) -> list[int]:
    """Ids that end an assistant's turn."""
    names = ("<|end|>", "<|im_end|>", "<|eot_id|>", tokenizer.eos_token)
    known = tokenizer.get_vocab()
    return sorted({known[name] for name in names if name in known})


class _Written:
    """What people wrote, taken out of what the template sees: each piece leaves a mark with its number.

    A message's content leaves as a whole. In the fields of tools and calls only what looks like a special token leaves,
    or like a mark, since templates write those fields as JSON, look into them and compare them.

    Attributes:
        pieces: text and the role of its turn, "" for a piece of a field.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.pieces: list[tuple[str, str]] = []
        special = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len, reverse=True)
        self._risky = re.compile("|".join([*map(re.escape, special), "[\ue000\ue001]"]))

    def message(self, message: Message) -> dict[str, Any]:
        marked: dict[str, Any] = {"role": message["role"], "content": ""}
        if message["content"]:  # an empty one stays empty: templates ask whether there is any
            marked["content"] = self._mark(message["content"], message["role"])
        for field in ("tool_call_id", "name"):
            if field in message:
                marked[field] = self.shielded(message[field])
        if "tool_calls" in message:
            marked["tool_calls"] = self.shielded(message["tool_calls"])
        return marked

    def shielded(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._risky.sub(lambda found: self._mark(found[0], ""), value)
        if isinstance(value, dict):
            return {self.shielded(key): self.shielded(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.shielded(inner) for inner in value]
        return value

    def _mark(self, text: str, role: str) -> str:
        self.pieces.append((text, role))
        return f"\ue000{len(self.pieces) - 1}\ue001"
