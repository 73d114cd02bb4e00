"""From a serve spec to an engine: load the members, fit the heads, refuse what does not belong together."""

from __future__ import annotations

import hashlib

from tigerbot import __version__
from tigerbot.errors import ModelError
from tigerbot.models import model_hash
from tigerbot.spec import ServeSpec
from tigerbot_serve.engine.engine import Engine
from tigerbot_serve.ensemble.heads import load_heads
from tigerbot_serve.ensemble.judge import Judge
from tigerbot_serve.ensemble.load import load_members
from tigerbot_serve.ensemble.mixture import Mixture
from tigerbot_serve.plugins.lookups import Lookups
from tigerbot_serve.plugins.registry import load_plugins


def build_engine(spec: ServeSpec) -> Engine:
    """The engine of a spec, not started. It runs on a GPU where the spec gives each replica one.

    Raises:
        ModelError: a folder is missing, tokenizers or bases differ, or heads are of other models.
    """
    members = load_members(spec.members, "cuda" if spec.scale.gpus_per_replica > 0 else "cpu")
    heads = None
    if spec.heads is not None:
        if members.alone:
            raise ModelError("heads want two members", where=f"heads: {spec.heads}", fix="add members.factual")
        heads = load_heads(spec.heads, members.hashes, members.width, members.device)
    mixture = Mixture(members, heads, spec.dial)
    judge = Judge(members, heads, spec.judge, Lookups(load_plugins(spec.plugins)))
    return Engine(
        mixture, judge, spec.engine, threads=spec.scale.threads, fingerprint=fingerprint(spec, members.hashes)
    )


def fingerprint(spec: ServeSpec, hashes: dict[str, str]) -> str:
    """What decides the text of a seed, as one short name: members, heads, dial, judge, this release."""
    heads = model_hash(spec.heads) if spec.heads else ""
    settings = spec.dial.model_dump_json() + spec.judge.model_dump_json()
    told = "\n".join([*(f"{name} {value}" for name, value in sorted(hashes.items())), heads, settings, __version__])
    return f"fp_{hashlib.sha256(told.encode()).hexdigest()[:12]}"
