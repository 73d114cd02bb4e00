"""Fit the dial's numbers: a sweep's target that turns the dial over validation questions and reports the front's area.

    tiger run jobs/fit_dial.yaml
    python -m tigerbot_serve.ensemble.fit tiger-runs/fit-dial   # the best as a `dial:` block to paste

Questions are JSONL of {prompt, accept: [texts], reject: [texts]}: an answer is right that holds one of the first and none
of the second. Creative prompts are JSONL of {prompt, pattern}: an answer counts that the regular expression matches
whole; without a pattern every answer does. Neither may be what the dial is measured on afterwards.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from tigerbot.errors import DataError, InputError, TigerError
from tigerbot.spec import DialSpec
from tigerbot_serve.ensemble.offline import Pair, ServedRule

DIALS = (0.0, 0.25, 0.5, 0.75, 1.0)
FIELDS = ("a", "b", "temperature_factual", "temperature_creative", "plausibility", "mix")
_ANSWER, _TEXT = 16, 64  # tokens


class Params(TypedDict):
    """What the target takes: the dial's fields, folders, and the two files."""

    creative: str
    factual: str
    heads: NotRequired[str]
    questions: str
    prompts: str
    samples: NotRequired[int]
    a: NotRequired[float]
    b: NotRequired[float]
    temperature_factual: NotRequired[float]
    temperature_creative: NotRequired[float]
    plausibility: NotRequired[float]
    mix: NotRequired[str]


@dataclass(frozen=True)
class Case:
    """A prompt and what answers to it are good."""

    prompt: str
    accept: tuple[str, ...] = ()
    reject: tuple[str, ...] = ()
    pattern: str = ""

    def right(self, text: str) -> bool:
        told = text.lower()
        return any(one.lower() in told for one in self.accept) and not any(one.lower() in told for one in self.reject)

    def valid(self, text: str) -> bool:
        return not self.pattern or re.fullmatch(self.pattern, " ".join(text.split())) is not None


def fit(params: Params, report: Callable[[dict[str, float]], None]) -> None:
    """Reports `front`, the hypervolume of (diversity, accuracy) over five dials, and `accuracy_factual`, `diversity_creative`."""
    pair = _pair(params["creative"], params["factual"], params.get("heads"))
    questions, prompts = read_cases(params["questions"]), read_cases(params["prompts"])
    given: dict[str, Any] = {**params}
    rule = ServedRule(DialSpec.model_validate({name: given[name] for name in FIELDS if name in given}))
    samples, seed = given.get("samples", 4), given.get("seed", 0) + 1
    points = []
    for dial in DIALS:
        said = pair.answers([case.prompt for case in questions], rule, dial, seed, _ANSWER)
        right = sum(case.right(text) for case, text in zip(questions, said, strict=True)) / len(questions)
        repeated = [case for case in prompts for _ in range(samples)]
        wrote = pair.answers([case.prompt for case in repeated], rule, dial, seed, _TEXT)
        kinds = {(case.prompt, text) for case, text in zip(repeated, wrote, strict=True) if case.valid(text)}
        points.append((len(kinds) / len(repeated), right))
    report({"front": front(points), "accuracy_factual": points[0][1], "diversity_creative": points[-1][0], "step": 1})


def front(points: Sequence[tuple[float, float]]) -> float:
    """Area under the staircase of (diversity, accuracy) points."""
    area = reached = 0.0
    for diversity, accuracy in sorted(points, reverse=True):
        if accuracy > reached:
            area, reached = area + diversity * (accuracy - reached), accuracy
    return area


def dial_block(params: dict[str, Any]) -> str:
    """The dial's fields among a trial's parameters, as YAML for a serve spec."""
    lines = [
        f"  {name}: {params[name] if isinstance(params[name], str) else f'{params[name]:.4g}'}"
        for name in FIELDS
        if name in params
    ]
    return "\n".join(["dial:", *lines])


def read_cases(path: str) -> list[Case]:
    """The cases of a JSONL file.

    Raises:
        DataError: it is missing, or a line is not a case.
    """
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read ({error})", where=path, fix="write {prompt, accept, reject} lines") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            case = Case(
                row["prompt"], tuple(row.get("accept", ())), tuple(row.get("reject", ())), row.get("pattern", "")
            )
            re.compile(case.pattern)
        except (ValueError, KeyError, TypeError, AttributeError, re.error) as error:
            raise DataError(
                f"is no case ({error})", where=f"{path}:{number}", fix='write {"prompt": "...", "accept": ["..."]}'
            ) from None
        found.append(case)
    if not found:
        raise DataError("holds no case", where=path, fix="write one JSON object a line")
    return found


@cache
def _pair(creative: str, factual: str, heads: str | None) -> Pair:
    """Loaded once for all trials of a process."""
    return Pair(creative, factual, heads)


def main(folder: str) -> None:
    """Print the best of a finished sweep.

    Raises:
        InputError: it is none.
    """
    state = Path(folder) / "state.json"
    try:
        result = json.loads(state.read_text(encoding="utf-8"))["result"]
        print(dial_block(result["params"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError("is no finished sweep", where=folder, fix="tiger run jobs/fit_dial.yaml") from None


if __name__ == "__main__":
    try:
        main(sys.argv[1] if len(sys.argv) > 1 else "tiger-runs/fit-dial")
    except TigerError as error:
        print(f"fit: {error}", file=sys.stderr)
        sys.exit(2)
