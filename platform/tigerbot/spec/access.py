"""Who may use an endpoint and how much: limits of a key, prices, audit, traces. Shared by the spec and the key file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tigerbot.spec.parts import Count, Part, Real

Period = Literal["day", "month"]


class BudgetSpec(Part):
    """What a key may spend in a calendar day or month (UTC): tokens, or money at `access.price_per_1k`."""

    tokens: Count | None = None
    money: Annotated[Real, Field(gt=0)] | None = None
    per: Period = "month"

    @model_validator(mode="after")
    def _one_unit(self) -> BudgetSpec:
        if (self.tokens is None) == (self.money is None):
            raise ValueError("wants one of tokens and money")
        return self


class LimitsSpec(Part):
    """What one key may do. The defaults are above what a replica can do, so that they stop nobody by themselves."""

    requests_per_minute: Count = 600_000
    tokens_per_minute: Count = 60_000_000
    concurrent: Count = 512
    budget: BudgetSpec | None = None


class PriceSpec(Part):
    """Money for 1,000 tokens. Abandoned drafts cost as completions, what the judge reads costs as prompts."""

    prompt: Annotated[Real, Field(ge=0)] = 0.0
    completion: Annotated[Real, Field(ge=0)] = 0.0


class AuditSpec(Part):
    """One line a request, never a body: into a file of the run folder, rotated at `max_bytes`, or to stdout."""

    to: Literal["file", "stdout", "off"] = "file"
    max_bytes: Annotated[Count, Field(ge=10_000)] = 64_000_000
    keep: Count = 5


class AccessSpec(Part):
    """Limits of a key that names none of its own, prices, admission, audit and traces.

    `max_outstanding_tokens` is how many tokens a replica may have before it; auto is eight times what its slots hold.
    """

    limits: LimitsSpec = LimitsSpec()
    price_per_1k: PriceSpec = PriceSpec()
    max_outstanding_tokens: Count | Literal["auto"] = "auto"
    audit: AuditSpec = AuditSpec()
    traces: Literal["off", "console", "file"] = "off"
