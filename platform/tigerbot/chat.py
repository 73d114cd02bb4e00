"""From messages to token ids: one function for training and for serving, so that both see the same tokens.

The template is the tokenizer's own. What a person wrote is encoded as plain text: it can name a special token, but
never become one. That holds for messages, and for the names, descriptions and arguments of tools.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NotRequired, TypedDict
from weakref import WeakKeyDictionary

from jinja2 import TemplateError

from tigerbot.errors import InputError, ModelError

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
    try:
        parts, pieces = _split(tokenizer, messages, tools, generation_prompt)
    except TemplateError as error:
        raise InputError(f"the chat template refuses them: {error}", where="messages", fix="change them") from None
    ids: list[int] = []
    loss: list[bool] = []
    after_assistant = False
    for part in parts:
        if isinstance(part, int):
            plain, role = pieces[part]
            new = encode_plain(tokenizer, plain)
            after_assistant = role == "assistant" if role else after_assistant
            flags = [role == "assistant"] * len(new)
        else:
            new = part
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
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.truncation is None and backend.padding is None:
        # What the line below comes to, at a quarter of its time, which is most of a short request's.
        if not backend.encode_special_tokens:
            backend.encode_special_tokens = True
        return backend.encode(text, add_special_tokens=False).ids
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def _split(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[dict[str, Any]], generation_prompt: bool
) -> tuple[list[list[int] | int], list[tuple[str, str]]]:
    """What the template writes, with the places of what people wrote; and these texts with the roles of their turns."""
    if not tools and all(len(message) == 2 for message in messages):
        roles = tuple(message["role"] for message in messages)
        return _template_parts(tokenizer, roles, generation_prompt), [(one["content"], one["role"]) for one in messages]
    written = _Written(tokenizer)
    text = tokenizer.apply_chat_template(
        [written.message(message) for message in messages],
        tools=[written.shielded(tool) for tool in tools] or None,
        tokenize=False,
        add_generation_prompt=generation_prompt,
    )
    return _cut(tokenizer, text), written.pieces


def _cut(tokenizer: Any, text: str) -> list[list[int] | int]:
    """Ids of what stands between the places, and the places' numbers."""
    return [
        int(part) if index % 2 else tokenizer.encode(part, add_special_tokens=False)
        for index, part in enumerate(_PLACE.split(text))
    ]


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
    parts = _cut(tokenizer, text)
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


class _Written:
    """What people wrote, taken out of what the template sees: each piece leaves a mark with its number.

    A message's content leaves as a whole. In the fields of tools and calls only what looks like a special token leaves,
    or like a mark, since templates write those fields as JSON, look into them and compare them.

    Attributes:
        pieces: text and the role of its turn, "" for a piece of a field.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.pieces: list[tuple[str, str]] = []
        self._tokenizer = tokenizer

    @cached_property
    def _risky(self) -> re.Pattern[str]:
        names = {*self._tokenizer.all_special_tokens, *self._tokenizer.get_added_vocab()}
        longest_first = sorted(names, key=len, reverse=True)
        return re.compile("|".join([*map(re.escape, longest_first), "[\ue000\ue001]"]))

    def message(self, message: Message) -> dict[str, Any]:
        marked: dict[str, Any] = {"role": message["role"], "content": ""}
        if message["content"] or "tool_calls" not in message:  # beside calls, templates ask whether there is any
            marked["content"] = self._mark(message["content"], message["role"])
        fields = {name: value for name, value in message.items() if name not in marked}
        return marked | self.shielded(fields)

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
