"""Compile DeepSpeed's one CPU op now, so that no first job waits for it. Run by setup: `python -m tigerbot_jobs.train.warm`."""

from __future__ import annotations

import os
import tempfile


def main() -> None:
    """Make a process group of one; DeepSpeed builds what it needs for it."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch
    import torch.distributed as dist

    from tigerbot_jobs.train.engine import connect_ranks

    with tempfile.NamedTemporaryFile() as file:
        dist.init_process_group("gloo", init_method=f"file://{file.name}.group", rank=0, world_size=1)
        connect_ranks(0, 1, torch.device("cpu"))
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
