"""Every kind of spec, and the typed spec of a mapping."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import ValidationError

from tigerbot.errors import SpecError
from tigerbot.spec.corpus import CorpusSpec
from tigerbot.spec.heads import EvalSpec, HeadsSpec
from tigerbot.spec.mistakes import line_at, nearest, spec_error
from tigerbot.spec.parts import Job
from tigerbot.spec.serve import ServeSpec
from tigerbot.spec.simulate import SimulateSpec
from tigerbot.spec.sweep import SweepSpec
from tigerbot.spec.train import TrainSpec

Spec = CorpusSpec | TrainSpec | HeadsSpec | SweepSpec | ServeSpec | EvalSpec | SimulateSpec
KINDS: dict[str, type[Job]] = {get_args(kind.model_fields["kind"].annotation)[0]: kind for kind in get_args(Spec)}


def parse_spec(raw: dict[str, Any], *, where: str = "spec", text: str = "") -> Spec:
    """The typed spec of a mapping; `where` and `text` only serve its error messages."""
    kind = raw.get("kind")
    model = KINDS.get(kind) if isinstance(kind, str) else None
    if model is None:
        near = nearest(str(kind), list(KINDS))
        raise SpecError(
            f"kind: got {kind!r}, wants one of {', '.join(KINDS)}",
            where=line_at(where, text, ("kind",)),
            fix=f"did you mean {near}?" if near else "name one of these",
        )
    try:
        return model.model_validate(raw)  # type: ignore[return-value]
    except ValidationError as error:
        raise spec_error(error, model, raw, where, text) from None


def json_schema(kind: str) -> dict[str, Any]:
    """JSON schema of a kind, for editors.

    Raises:
        SpecError: no such kind.
    """
    if kind not in KINDS:
        near = nearest(kind, list(KINDS))
        raise SpecError(
            f"got {kind!r}, wants one of {', '.join(KINDS)}", where="kind", fix=f"did you mean {near or 'train'}?"
        )
    return KINDS[kind].model_json_schema()
