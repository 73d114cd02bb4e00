"""Measured answers: ask an endpoint the closed world's questions at several dials, count what is true and what is new."""
