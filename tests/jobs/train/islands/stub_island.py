"""In place of `tiger run` of an island: the real model and rounds, no Ray, no DeepSpeed, no data.

    python stub_island.py SPEC.yaml

Island 1 dies in its third step, the first time.
"""

from __future__ import annotations

import math
import os
import sys

import torch
import torch.distributed as dist

from tigerbot.runs import write_json
from tigerbot.spec import TrainSpec, load_spec
from tigerbot_jobs.train.data import plan_batches
from tigerbot_jobs.train.islands.run import folder_of
from tigerbot_jobs.train.islands.sync import outer_of
from tigerbot_jobs.train.metrics import append_row
from tigerbot_jobs.train.model import LanguageModel, make_model
from tigerbot_jobs.train.shard import Slice


class Stub:
    """Every step adds a hundredth to every weight."""

    def __init__(self, spec: TrainSpec) -> None:
        self.device, self.zero_stage = torch.device("cpu"), 0
        self._named = list(LanguageModel(make_model(spec), None).named_parameters())

    def slices(self) -> list[Slice]:
        return [Slice(name, tuple(p.shape), 0, p.numel(), i, 0) for i, (name, p) in enumerate(self._named)]

    def state(self) -> dict[str, torch.Tensor]:
        return {f"{index}.master": parameter.detach() for index, (_, parameter) in enumerate(self._named)}

    def settle(self, *, step: int) -> None:
        pass  # the state's tensors are the weights

    def step(self) -> None:
        for tensor in self.state().values():
            tensor += 0.01


def main() -> None:
    spec = load_spec(sys.argv[1])
    assert isinstance(spec, TrainSpec) and spec.islands is not None
    folder = folder_of(spec)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{os.getpid()}", rank=0, world_size=1)
    plan, engine = plan_batches(spec, 1), Stub(spec)
    outer = outer_of(spec, plan.steps)
    assert outer is not None
    step, dies = outer.join(engine, 0), spec.islands.member == 1 and not (folder / "died").exists()
    while step < plan.steps:
        engine.step()
        step += 1
        if dies and step == 3:
            (folder / "died").touch()
            raise SystemExit("died, as told")
        outer.after_step(engine, step)
        tokens = step * plan.sequences * spec.data.sequence_length
        append_row(
            folder / "metrics.jsonl", {"step": step, "loss": math.exp(-step), "tokens": tokens, "tokens_per_second": 1}
        )
    result = {"steps": step, "tokens": tokens, "loss": 0.1, "validation_loss": 0.2, "tokens_per_second": 1}
    write_json(folder / "state.json", {"status": "done", "result": result})


if __name__ == "__main__":
    main()
