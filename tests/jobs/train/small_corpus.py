"""A small bilingual corpus, packed once, that every training test reads."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from tigerbot.runner import run_spec
from tigerbot.spec import TrainSpec, parse_spec, spec_hash
from tigerbot_jobs.data import creative
from tigerbot_jobs.train.shard import Shard


@dataclass(frozen=True)
class Corpus:
    """A finished corpus run: `tokenizer/`, `tokens/train`, `tokens/held-out`, 32 tokens a sequence."""

    folder: Path

    def spec(self, name: str, storage: Path, **train: Any) -> dict[str, Any]:
        """A train spec over this corpus: two-core size, 12 steps of 8 sequences."""
        loop = {"tokens": 3072, "batch_tokens": 256, "micro_batch": 2, "lr": 3e-3, "log_every": 1, "validate_every": 6}
        return {
            "kind": "train",
            "name": name,
            "model": {"preset": "tiny", "tokenizer": str(self.folder / "tokenizer")},
            "data": {
                "sequence_length": 32,
                "train": [{"path": str(self.folder / "tokens/train")}],
                "validation": [{"path": str(self.folder / "tokens/held-out")}],
            },
            "train": loop | train,
            "storage": {"uri": str(storage)},
            "tracking": {"uri": f"sqlite:///{storage}/mlflow.db"},
            "fault_tolerance": {"checkpoint_every_steps": 2},
        }


def as_train(raw: dict[str, Any]) -> TrainSpec:
    spec = parse_spec(raw)
    assert isinstance(spec, TrainSpec)
    return spec


def as_file(raw: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{raw['name']}.yaml"
    path.write_text(yaml.safe_dump(raw, allow_unicode=True), encoding="utf-8")
    return path


def make_corpus(folder: Path) -> Corpus:
    """Write two files and run a corpus spec over them."""
    rng = random.Random(1)
    for name, count in (("train", 300), ("held-out", 40)):
        texts = [creative.write(kind, lang, rng) for _ in range(count) for kind in ("story",) for lang in ("zh", "en")]
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    raw = {
        "kind": "corpus",
        "name": "corpus",
        "sources": [{"name": name, "path": str(folder / f"{name}.jsonl")} for name in ("train", "held-out")],
        "tokenizer": {"vocab_size": 600},
        "sequence_length": 32,
        "storage": {"uri": str(folder)},
    }
    run_spec(parse_spec(raw))
    return Corpus(folder / "corpus")


def kill_driver(process: subprocess.Popen) -> None:
    """SIGKILL, and wait until its workers, which notice a moment later, write nothing more."""
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "ray::" in "".join(child.cmdline()[:1])
    ]
    process.kill()
    process.wait()
    psutil.wait_procs(workers, timeout=90)


def forget_memory(spec: TrainSpec) -> None:
    """As a machine that was switched off: nothing of the run is in shared memory."""
    from tigerbot_jobs.train.recovery.run import forget_memory

    absolute = spec.storage.model_copy(update={"uri": str(Path(spec.storage.uri).absolute())})
    forget_memory(spec.model_copy(update={"storage": absolute}), spec_hash(spec))


def fingerprint(raw: dict[str, Any], step: int = 12) -> dict[str, str]:
    """SHA-256 of every rank's weights and moments in a checkpoint; not of what its header tells of the way there."""
    folder = Path(raw["storage"]["uri"]) / raw["name"] / f"checkpoints/step-{step:08d}"
    names = [file["path"] for file in json.loads((folder / "MANIFEST.json").read_text())["files"]]
    return {name: _digest(Shard.open(folder / name)) for name in sorted(names) if name.startswith("rank")}


def _digest(shard: Shard) -> str:
    digest = hashlib.sha256(f"{shard.meta.step} {shard.meta.rank} of {shard.meta.world_size}".encode())
    for name in sorted(shard.names()):
        digest.update(name.encode() + shard.array(name).tobytes())
    return digest.hexdigest()
