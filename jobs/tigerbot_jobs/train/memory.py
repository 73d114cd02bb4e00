"""TEMPORARY stand-in until the memory room arrives."""
from __future__ import annotations
import mmap, struct, time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
import numpy as np
from tigerbot_jobs.train.shard import Shard, ShardMeta, encode_header

HEAD = 65536
_S = struct.Struct("<QQQQ")  # seq, step, generation, valid


@dataclass(frozen=True)
class Snapshot:
    meta: ShardMeta
    offset: int
    size: int
    view: Any


class SnapshotBuffer:
    def __init__(self, path, state, head):
        self.path, self.head = path, head
        numels = {k: v.numel() for k, v in state.items()}
        self.size = head + 4 * sum(numels.values())
        self.slot = -(-self.size // 4096) * 4096
        with open(path, "wb") as f:
            f.truncate(4096 + 2 * self.slot)
        self.file = open(path, "r+b")
        self.map = mmap.mmap(self.file.fileno(), 0)
        self.map[0:16] = struct.pack("<QQ", self.size, self.slot)
        self.seq = 0
        self.numels = numels
        self.np = np.frombuffer(self.map, dtype=np.uint8)

    @classmethod
    def create(cls, path, state, meta):
        return cls(path, state, len(encode_header(meta, {k: v.numel() for k, v in state.items()})) + 65536)

    def write(self, state, meta, hold=False):
        began = time.perf_counter()
        self.seq += 1
        slot = self.seq % 2
        ctl = 64 + slot * 64
        self.map[ctl:ctl + 32] = _S.pack(self.seq, meta.step, meta.generation, 0)
        base = 4096 + slot * self.slot
        header = encode_header(meta, self.numels, self.head)
        self.map[base:base + len(header)] = header
        at = base + len(header)
        for k, v in state.items():
            a = v.detach().cpu().numpy().reshape(-1)
            self.np[at:at + a.nbytes].view(np.float32)[:] = a
            at += a.nbytes
        self.map[ctl:ctl + 32] = _S.pack(self.seq, meta.step, meta.generation, 1)
        return time.perf_counter() - began


def read_snapshots(path):
    out = []
    with open(path, "rb") as f:
        m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    size, stride = struct.unpack("<QQ", m[0:16])
    for slot in range(2):
        ctl = 64 + slot * 64
        seq, step, gen, ok = _S.unpack(m[ctl:ctl + 32])
        if not ok:
            continue
        base = 4096 + slot * stride
        view = memoryview(m)[base:base + size]
        out.append(Snapshot(Shard.over(view, str(path)).meta, base, size, view))
    return out


def interval(copy_s, step_s, before, share=0.02):
    best = max(1, int(np.ceil(copy_s / max(step_s * share, 1e-9))))
    return max(max(1, before // 2), min(before * 2, best))
