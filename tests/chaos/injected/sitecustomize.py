"""Faults put into training workers from outside, and a record of every sequence they train on.

Python imports a module of this name by itself where its folder is on PYTHONPATH, so that nothing in the product knows of
it. `TIGER_INJECT_FOLDER` takes the records; `TIGER_INJECT` is a JSON list of faults:

    {"do": "nan" | "spike" | "sleep" | "bug" | "wait" | "flip", ...}

with `rank`, `world_size`, `steps` and `batches` (first and last, both with it) to say where, `once` to do it a single time
in the whole run, and `seconds` for `wait`, which slows a step down. `flip` changes one bit of the weights; with it replicas
are compared every ten steps.
"""

import importlib.machinery
import json
import os
import socket
import sys
import time
import zlib
from importlib.abc import MetaPathFinder

_LOOP = "tigerbot_jobs.train.loop"


class _Finder(MetaPathFinder):
    """Finds the training loop once, and changes it as it is imported."""

    def find_spec(self, name, path, target=None):
        if name != _LOOP:
            return None
        sys.meta_path.remove(self)
        found = importlib.machinery.PathFinder.find_spec(name, path)
        plain = found.loader.exec_module

        def exec_module(module):
            plain(module)
            _change(module)

        found.loader.exec_module = exec_module
        return found


def _change(loop):
    rank_run = loop.RankRun
    plain, folder = rank_run._one_step, os.path.realpath(os.environ["TIGER_INJECT_FOLDER"])
    with open(f"{folder}/inject.json") as file:
        faults = list(enumerate(json.load(file)))
    if any(fault["do"] == "flip" for _, fault in faults):
        loop._REPLICAS_EVERY = 10
    # Nodes that are machines of their own have the same process ids.
    record = open(f"{folder}/used-{socket.gethostname()}-{os.getpid()}.jsonl", "a", buffering=1)  # noqa: SIM115

    def one_step(self):
        batch = self._guard.skips.data_index(self.step) if self._guard else self.step
        at = {"rank": self._rank, "world_size": self._world_size, "step": self.step, "batch": batch}
        used = [zlib.crc32(row.tobytes()) for one in self._batches for row in _counted(one)]
        record.write(json.dumps(at | {"generation": self._keep._form.generation, "used": used}) + "\n")
        hooks = [_do(self, fault) for index, fault in faults if _meant(fault, at) and _first(folder, index, fault)]
        try:
            return plain(self)
        finally:
            for hook in hooks:
                if hook is not None:
                    hook.remove()

    rank_run._one_step = one_step


def _counted(batch):
    """The sequences of a micro batch, without the filler of a rank that has none."""
    return batch.input_ids[(batch.labels >= 0).any(axis=1)]


def _meant(fault, at):
    same = all(fault.get(name, at[name]) == at[name] for name in ("rank", "world_size"))
    ranges = ((at["step"], fault.get("steps")), (at["batch"], fault.get("batches")))
    inside = (span is None or span[0] <= place <= span[1] for place, span in ranges)
    return same and all(inside)


def _first(folder, index, fault):
    try:
        return not fault.get("once") or os.close(os.open(f"{folder}/once-{index}", os.O_CREAT | os.O_EXCL)) is None
    except FileExistsError:
        return False


def _do(run, fault):
    module = run._engine._ds.module
    if fault["do"] == "bug":
        raise ValueError("injected")
    if fault["do"] == "wait":
        time.sleep(fault["seconds"])
    elif fault["do"] == "flip":
        import torch

        next(tensor for tensor in run._engine.state().values() if tensor.numel() > 9).view(torch.int32)[9] ^= 1 << 20
    elif fault["do"] == "sleep":
        return module.register_forward_pre_hook(lambda *_: time.sleep(86_400))
    elif fault["do"] == "nan":
        return module.register_forward_hook(lambda module, given, loss: loss * float("nan"))
    elif fault["do"] == "spike":
        return module.register_forward_hook(lambda module, given, loss: loss * 50)
    return None


if "TIGER_INJECT_FOLDER" in os.environ:
    sys.meta_path.insert(0, _Finder())
