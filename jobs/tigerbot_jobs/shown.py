"""How numbers and words are written for people: lengths of time, money, bars of text, names from outside."""

from __future__ import annotations


def clock(seconds: float) -> str:
    """A moment of the run: 3:07:15."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def span(seconds: float) -> str:
    """A length of time with two units: 3 d 4 h, 2 h 5 min, 12.5 s."""
    for unit, name, below, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= unit:
            return f"{int(seconds // unit)} {name} {int(seconds % unit // below)} {smaller}"
    return f"{seconds:.3g} s"


def money(amount: float, total: float) -> str:
    """An amount of whatever the price is in; with more decimals where the run's total is small."""
    return f"{amount:,.2f}" if total >= 100 else f"{amount:.4f}"


def bar(share: float, width: int = 20) -> str:
    """A bar of text in eighths of a character."""
    eighths = round(min(1.0, share) * width * 8)
    return ("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8]).ljust(width + 1)[: width + 1]


def printable(text: str) -> str:
    """Text from outside without what would move a terminal's cursor, on one line."""
    return "".join(c if c.isprintable() else " " for c in text)
