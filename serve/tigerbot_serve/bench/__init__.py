"""`tiger bench`: load on an OpenAI-compatible endpoint, and what its answers took."""
