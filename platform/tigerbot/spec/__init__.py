"""Specs: what a person submits, as YAML, checked before anything starts.

`load_spec(path, overrides)` reads one YAML document, applies `--set a.b=c`, and returns the typed spec of its `kind`.
Every mistake is one `SpecError` line: file and line, field, what it got, what it wants, the nearest valid name. This
package knows nothing about how a spec is run. It has a module for each kind; all of them are imported from here.
"""

from tigerbot.spec.corpus import CorpusSource, CorpusSpec
from tigerbot.spec.document import load_spec
from tigerbot.spec.heads import EvalSpec, HeadsSpec
from tigerbot.spec.identity import flat, spec_changes, spec_difference, spec_hash
from tigerbot.spec.kinds import KINDS, Spec, json_schema, parse_spec
from tigerbot.spec.model import Lora, ModelSource
from tigerbot.spec.parts import Job
from tigerbot.spec.plugins import PluginSpec
from tigerbot.spec.serve import (
    CanarySpec,
    DialSpec,
    EngineSpec,
    GateSpec,
    GrammarSpec,
    JudgeSpec,
    MembersSpec,
    ServeSpec,
    SpeculateSpec,
    VllmSpec,
)
from tigerbot.spec.simulate import (
    BuySpec,
    FailureSpec,
    FaultKind,
    HumanSpec,
    PlannedSpec,
    PolicySpec,
    SimulateSpec,
)
from tigerbot.spec.sweep import SweepSpec
from tigerbot.spec.train import DataSource, Islands, Scale, TrainLoop, TrainSpec

__all__ = [
    "KINDS",
    "BuySpec",
    "CanarySpec",
    "CorpusSource",
    "CorpusSpec",
    "DataSource",
    "DialSpec",
    "EngineSpec",
    "EvalSpec",
    "FailureSpec",
    "FaultKind",
    "GateSpec",
    "GrammarSpec",
    "HeadsSpec",
    "HumanSpec",
    "Islands",
    "Job",
    "JudgeSpec",
    "Lora",
    "MembersSpec",
    "ModelSource",
    "PlannedSpec",
    "PluginSpec",
    "PolicySpec",
    "Scale",
    "ServeSpec",
    "SimulateSpec",
    "Spec",
    "SpeculateSpec",
    "SweepSpec",
    "TrainLoop",
    "TrainSpec",
    "VllmSpec",
    "flat",
    "json_schema",
    "load_spec",
    "parse_spec",
    "spec_changes",
    "spec_difference",
    "spec_hash",
]
