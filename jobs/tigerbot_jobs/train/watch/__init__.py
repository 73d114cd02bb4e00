"""The detectors: what a run notices about itself. Pure logic with an injected clock; who acts on it is elsewhere.

Every finding is a frozen dataclass with `evidence`, one sentence that a person can read.
"""
