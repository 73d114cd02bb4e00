"""The ground floor: what every job and every server stands on."""

import os

__version__ = "0.1.0"

# Ray's own token authentication: whoever has no token runs no code here. Ray reads this when it is first imported.
os.environ.setdefault("RAY_AUTH_MODE", "token")
