"""What runs on a cluster and stays: the engine, the ensemble and its OpenAI-compatible gateway."""

import os

# Large tensors in huge pages: a step is bound by reading weights (docs/engine.md). torch asks once, at its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
