"""Prefix reuse: keys and values of text that was read before, kept in blocks of tokens under a budget of bytes.

A block's key is a hash chain: over the side and the members' hashes, every block before it, its own tokens, and a salt.
The salt is the tenant's, since a hit is faster than a miss and so tells what others have sent; only blocks that lie
wholly inside a public prefix (the system message of the spec) are everybody's. Each side has its own chain: at an end
of the dial one side alone is read, and kept. What leaves first is what was not used for longest, a chain's end before
its beginning, so that what is left can always be reached. This module knows nothing about requests or scheduling.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from tigerbot.chat import encode_chat, encode_plain
from tigerbot_serve.engine.memory import out_of_memory
from tigerbot_serve.ensemble.members import CREATIVE, FACTUAL, Caches

BLOCK = 16  # tokens
_DIGEST_BYTES = 16


class PrefixCache:
    """Blocks of keys and values by what came before them.

    Args:
        hashes: of the members; blocks of other weights are never found.
        budget_bytes: 0 keeps nothing.
        public: token ids that prompts may begin with and that are no tenant's own.

    Attributes:
        bytes: kept now.
        reused: tokens that were not read again, so far.
    """

    def __init__(self, hashes: Mapping[str, str], budget_bytes: int, public: Sequence[Sequence[int]] = ()) -> None:
        self._budget, self._public = budget_bytes, [tuple(ids) for ids in public]
        self._roots = [_digest(f"{side} {sorted(hashes.items())}".encode()) for side in (CREATIVE, FACTUAL)]
        self._blocks: OrderedDict[bytes, Tensor] = OrderedDict()
        self.bytes = self.reused = 0

    def restore(self, side: int, tenant: str, ids: Sequence[int], caches: Caches) -> int:
        """Put the longest known beginning of `ids` into row 0 of a side; gives its length in tokens."""
        found: list[bytes] = []
        for key in self._chain(side, tenant, ids) if self._blocks else ():
            if key not in self._blocks:
                break
            found.append(key)
        if found:
            caches.write(side, 0, torch.cat([self._blocks[key] for key in found], dim=3))
            self._touch(found)
        length = len(found) * BLOCK
        self.reused += length
        return length

    def store(self, side: int, tenant: str, ids: Sequence[int], caches: Caches, index: int = 0) -> None:
        """Keep what row `index` of a side holds for `ids`, which begin at position 0. Known blocks are not copied."""
        if self._budget <= 0:
            return
        keys = self._chain(side, tenant, ids)
        known = next((place for place, key in enumerate(keys) if key not in self._blocks), len(keys))
        try:
            if known < len(keys):
                new = caches.read(side, index, known * BLOCK, len(keys) * BLOCK)
                for key, block in zip(keys[known:], new.split(BLOCK, dim=3), strict=True):
                    self._blocks[key] = block.clone()  # a view would keep all of `new` alive
                    self.bytes += block.nbytes
        except Exception as error:
            if not out_of_memory(error):
                raise
            self.clear()  # it is only a convenience
            return
        self._touch(keys)
        while self.bytes > self._budget:
            self.bytes -= self._blocks.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        self._blocks.clear()
        self.bytes = 0

    def _touch(self, chain: Sequence[bytes]) -> None:
        """Make a chain the most recently used, its beginning most of all."""
        for key in reversed(chain):
            self._blocks.move_to_end(key)

    def _chain(self, side: int, tenant: str, ids: Sequence[int]) -> list[bytes]:
        """The keys of the whole blocks of `ids`."""
        shared = max((_common(ids, public) for public in self._public), default=0) // BLOCK
        own = _digest(tenant.encode("utf-8", "surrogatepass"))
        key, keys = self._roots[side], []
        for place in range(len(ids) // BLOCK):
            tokens = array("q", ids[place * BLOCK : (place + 1) * BLOCK]).tobytes()
            key = _digest(key + tokens, salt=b"" if place < shared else own)
            keys.append(key)
        return keys


def public_prefixes(tokenizer: Any, text: str | None) -> list[list[int]]:
    """The token ids that a public text begins a prompt with: as a chat's system message, and as plain text."""
    if not text:
        return []
    plain = encode_plain(tokenizer, text)
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    found = [plain, begin + plain]
    if tokenizer.chat_template:
        found.append(encode_chat(tokenizer, [{"role": "system", "content": text}])[0])
    return found


def _digest(data: bytes, salt: bytes = b"") -> bytes:
    return blake2b(data, digest_size=_DIGEST_BYTES, salt=salt).digest()


def _common(ids: Sequence[int], public: Sequence[int]) -> int:
    """How many tokens both begin with."""
    both = zip(ids, public, strict=False)
    return next((place for place, (mine, theirs) in enumerate(both) if mine != theirs), min(len(ids), len(public)))
