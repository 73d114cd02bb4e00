"""What makes two specs the same run: the hash, and the fields that differ."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from tigerbot.spec.parts import Job

# What a run may change without becoming another run: where it runs, how it survives, where it reports.
_NOT_IDENTITY: dict[str, Any] = {
    **dict.fromkeys(("scale", "fault_tolerance", "tracking", "storage", "access"), True),
    **dict.fromkeys(("max_concurrent", "cpus_per_trial", "gpus_per_trial", "deadline_s", "same_failures"), True),
    "transfer_from": True,
    "islands": {"server", "here", "deadline_s"},
}


def spec_hash(spec: Job) -> str:
    """Identity of what a run computes: 16 hex digits over every field but scale, fault tolerance, tracking, storage."""
    fields = spec.model_dump(mode="json", exclude=_NOT_IDENTITY)
    canonical = json.dumps(fields, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def spec_changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The identity fields that differ between two dumped specs, with both values."""
    before, after = flat(old), flat(new)
    keys = [key for key in sorted({*before, *after}) if _NOT_IDENTITY.get(key.split(".")[0]) is not True]
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def spec_difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The same as lines `field: old -> new`."""
    return [f"{key}: {before!r} -> {after!r}" for key, (before, after) in spec_changes(old, new).items()]


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one of dotted fields."""
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= flat(item, f"{prefix}.{key}" if prefix else str(key))
    return found
