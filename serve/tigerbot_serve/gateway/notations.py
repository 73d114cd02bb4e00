"""How models of different families write tool calls: one table, chosen by the model's own chat template.

A row is the text of calls in pieces. The grammar that an answer is held to is made of them (`tools.py`), and so is what
reads the calls back out of the text, with white space where a family varies it (`calls.py`). A template that takes no
tools, or writes calls in a way that is not in the table, is told of the tools and of Hermes' notation in a system text.

Where the notations come from:
    hermes: NousResearch/Hermes-Function-Calling, "Prompt Format for Function Calling"; Qwen 2.5 and 3 have it too.
    llama: meta-llama/llama-models, models/llama3_1/prompt_format.md, "JSON based tool calling"; the templates of Llama
        3.1 to 3.3 take one call a turn; some answers begin with <|python_tag|> (vLLM: llama_tool_parser.py).
    mistral: mistralai/mistral-common, integrations/chat_templates: v3.jinja, v7.jinja (an array of calls); ids of calls
        are nine letters and digits there.
    mistral_args: the same folder, v13.jinja.
    deepseek_v3, deepseek_v31: vllm-project/vllm, examples/tool_chat_template_deepseekv3.jinja and ...v31.jinja, read by
        deepseekv3_tool_parser.py and deepseekv31_tool_parser.py.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import regex

from tigerbot import chat

_NAME = r"(?P<name>[\w.-]{1,64})"
_PIECES = regex.compile(r"\s+|[{}\[\],:]|[^\s{}\[\],:]+")


@dataclass(frozen=True)
class Notation:
    """One way to write calls: `open`, then each call, `join` between two of them, then `close`.

    A call is `before`, its name, `between`, its arguments as a JSON object, `after`.

    Attributes:
        known_by, unlike: texts that are all, and that none of them are, in the chat templates of such models.
        mark: what leads from text to calls; "" where calls stand at the beginning of an answer or not at all.
        specials: parts of the pieces that are special tokens in some vocabularies.
        may_lead: a special token that may stand before everything.
        may_follow: what reading passes over after the arguments, as a regular expression.
        parallel: whether templates take several calls in a turn.
        text_arguments: templates want the arguments of earlier calls as text.
        short_ids: templates want ids of nine letters and digits.
    """

    name: str
    known_by: tuple[str, ...]
    unlike: tuple[str, ...]
    mark: str
    specials: tuple[str, ...]
    open: str
    before: str
    between: str
    after: str
    join: str
    close: str
    may_lead: str = ""
    may_follow: str = ""
    parallel: bool = True
    text_arguments: bool = False
    short_ids: bool = False

    def written(self, calls: list[tuple[str, str]]) -> str:
        """Names and arguments as such a model writes them."""
        one = [f"{self.before}{name}{self.between}{arguments}{self.after}" for name, arguments in calls]
        return f"{self.open}{self.join.join(one)}{self.close}"

    def new_id(self) -> str:
        return secrets.token_hex(5)[:9] if self.short_ids else f"call_{secrets.token_hex(12)}"

    def special_ids(self, tokenizer: Any) -> dict[str, int]:
        """Which of its parts are special tokens of this vocabulary: decoding to text would leave them out."""
        known = tokenizer.added_tokens_decoder
        ids = {str(token): number for number, token in known.items() if token.special}
        return {part: ids[part] for part in (*self.specials, self.may_lead) if part in ids}

    @property
    def unjudged(self) -> str:
        """What the text of every call holds, and other texts hardly do."""
        return self.mark or self.before

    @cached_property
    def first(self) -> regex.Pattern[str]:
        """From the mark to the first call's arguments."""
        lead = rf"\s*(?:{regex.escape(self.may_lead)}\s*)?" if self.may_lead else ""
        return _compiled(lead, loosely(self.open + self.before), _NAME, loosely(self.between), r"\s*(?=\{)")

    @cached_property
    def next(self) -> regex.Pattern[str]:
        """From the end of a call to the next one's arguments."""
        return _compiled(r"\s*", loosely(self.join + self.before), _NAME, loosely(self.between), r"\s*(?=\{)")

    @cached_property
    def end(self) -> regex.Pattern[str]:
        """From a call's arguments to its end."""
        return _compiled(self.may_follow, r"\s*", loosely(self.after))

    @cached_property
    def last(self) -> regex.Pattern[str]:
        """From the end of the last call to what else the answer says."""
        return _compiled(r"\s*", loosely(self.close)) if self.close else _compiled("")


def notation_of(tokenizer: Any) -> Notation | None:
    """What the chat template's model was taught; None where the template takes no tools or is of another kind."""
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several by name: the one for tools stands for them
        template = template.get("tool_use") or template.get("default")
    return _by_template(template) if template and chat.takes_tools(tokenizer) else None


@cache
def _by_template(template: str) -> Notation | None:
    for notation in TABLE:
        known = all(text in template for text in notation.known_by)
        if known and not any(text in template for text in notation.unlike):
            return notation
    return None


def loosely(text: str) -> str:
    """A regular expression of a text in which JSON's punctuation may have white space around it, but not at its end."""
    found, gap = "", False
    for piece in _PIECES.findall(text.rstrip()):
        mark = piece in "{}[],:"
        found += r"\s*" if gap or mark or piece.isspace() else ""
        found += "" if piece.isspace() else regex.escape(piece)
        gap = mark
    return found


def _compiled(*parts: str) -> regex.Pattern[str]:
    # Two runs of white space side by side would be tried in every way of sharing them.
    return regex.compile(regex.sub(r"(?:\\s\*)+", r"\\s*", "".join(parts)))


HERMES = Notation(
    "hermes",
    known_by=("<tool_call>",),
    unlike=("<function=", "<arg_key>"),  # Qwen3-Coder's and GLM's XML inside the same marks
    mark="<tool_call>",
    specials=("<tool_call>", "</tool_call>"),
    open="",
    before='<tool_call>\n{"name": "',
    between='", "arguments": ',
    after="}\n</tool_call>",
    join="\n",
    close="",
)
LLAMA = Notation(
    "llama",
    known_by=("ipython", '"parameters": '),
    unlike=(),
    mark="",
    specials=(),
    open="",
    before='{"name": "',
    between='", "parameters": ',
    after="}",
    join="; ",
    close="",
    may_lead="<|python_tag|>",
    parallel=False,
)
MISTRAL = Notation(
    "mistral",
    known_by=("[TOOL_CALLS]",),
    unlike=("[ARGS]",),
    mark="[TOOL_CALLS]",
    specials=("[TOOL_CALLS]",),
    open="[TOOL_CALLS] [",
    before='{"name": "',
    between='", "arguments": ',
    after="}",
    join=", ",
    close="]",
    may_follow=r'(?:\s*,\s*"id"\s*:\s*"[^"]*")?',
    short_ids=True,
)
MISTRAL_ARGS = Notation(
    "mistral_args",
    known_by=("[TOOL_CALLS]", "[ARGS]"),
    unlike=("[CALL_ID]",),
    mark="[TOOL_CALLS]",
    specials=("[TOOL_CALLS]", "[ARGS]"),
    open="",
    before="[TOOL_CALLS]",
    between="[ARGS]",
    after="",
    join="",
    close="",
    short_ids=True,
)
_DEEPSEEK = ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")
_DEEPSEEK_PARTS = tuple(f"<｜tool▁{part}｜>" for part in _DEEPSEEK)
DEEPSEEK_V3 = Notation(
    "deepseek_v3",
    known_by=("<｜tool▁sep｜>", "```json"),
    unlike=(),
    mark="<｜tool▁calls▁begin｜>",
    specials=_DEEPSEEK_PARTS,
    open="<｜tool▁calls▁begin｜>",
    before="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    between="\n```json\n",
    after="\n```<｜tool▁call▁end｜>",
    join="\n",
    close="<｜tool▁calls▁end｜>",
)
DEEPSEEK_V31 = Notation(
    "deepseek_v31",
    known_by=("<｜tool▁sep｜>",),
    unlike=("```json",),
    mark="<｜tool▁calls▁begin｜>",
    specials=_DEEPSEEK_PARTS,
    open="<｜tool▁calls▁begin｜>",
    before="<｜tool▁call▁begin｜>",
    between="<｜tool▁sep｜>",
    after="<｜tool▁call▁end｜>",
    join="",
    close="<｜tool▁calls▁end｜>",
    text_arguments=True,
)
TABLE = (HERMES, LLAMA, MISTRAL, MISTRAL_ARGS, DEEPSEEK_V3, DEEPSEEK_V31)
