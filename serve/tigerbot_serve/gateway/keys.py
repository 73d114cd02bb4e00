"""API keys: read from the environment once, kept as SHA-256 digests only, compared in constant time.

Keys are long and random, so that a fast hash is enough; what a memory dump or a pickled deployment shows is digests.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from dataclasses import dataclass

from tigerbot_serve.gateway.errors import ApiError


@dataclass(frozen=True)
class KeyRing:
    """Digests of the accepted keys. An empty ring is an open door: `deploy` allows it on loopback only."""

    digests: tuple[bytes, ...] = ()

    @classmethod
    def from_environment(cls, name: str) -> KeyRing:
        """The comma-separated keys in an environment variable."""
        keys = [key.strip() for key in os.environ.get(name, "").split(",")]
        return cls(tuple(hashlib.sha256(key.encode()).digest() for key in keys if key))

    def __bool__(self) -> bool:
        return bool(self.digests)

    def check(self, authorization: str | None) -> str:
        """Who asks, as the first 8 hex digits of the key's digest; "open" where no key is needed.

        Raises:
            ApiError: 401, the key is absent or wrong.
        """
        if not self.digests:
            return "open"
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _refused("no API key: send it as `Authorization: Bearer KEY`")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # Every digest is compared, whatever the first ones gave: the time tells nothing.
        if not sum(hmac.compare_digest(digest, known) for known in self.digests):
            raise _refused("this API key is not known here")
        return digest.hex()[:8]


def _refused(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
