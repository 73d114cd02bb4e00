"""`calculator`: equations that an answer states, computed again. Arithmetic only, with bounds on every number.

`2 ** 3 = 9`, `12 × 7 等于 85` and `1,200 / 7 is 171.4` are equations; what is right of the sign is not looked at.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from decimal import Context, Decimal, DecimalException, Overflow

from tigerbot.spec.plugins import CalculatorPlugin
from tigerbot_serve.ensemble.evidence import Evidence, Inquiry

MAX_CHARACTERS, MAX_NODES, MAX_EXPONENT, MAX_EQUATIONS = 200, 64, 1000, 8
_NUMBER = r"\d[\d,]*(?:\.\d+)?"
_EQUATION = re.compile(rf"((?:[(\s]|-)*{_NUMBER}[\d\s.,+\-*/×÷^%()]*?)\s*(?:=|等于|是|equals|is)\s*(-?{_NUMBER})")
_SIGNS = str.maketrans({"×": "*", "÷": "/", "^": "**", ",": ""})


class Calculator:
    def __init__(self, spec: CalculatorPlugin) -> None:
        self.deadline_s, self._digits = spec.deadline_s, spec.max_digits

    def look_up(self, inquiry: Inquiry) -> Sequence[Evidence]:
        found = []
        for match in list(_EQUATION.finditer(inquiry.answer))[:MAX_EQUATIONS]:
            written = match.group(1).strip()
            value = compute(written, self._digits)
            if value is not None and any(sign in written.lstrip("-( ") for sign in "+-*/×÷^%"):
                text = f"{written} = {shown(value)}"
                found.append(Evidence("calculator", f"equation:{match.start()}", text, match.start(), match.end()))
        return found


def compute(expression: str, digits: int = 50) -> Decimal | None:
    """The value of an arithmetic expression, None for anything else or anything too large."""
    written = expression.strip().translate(_SIGNS)
    if len(written) > MAX_CHARACTERS:
        return None
    try:
        tree = ast.parse(written, mode="eval")
        if sum(1 for _ in ast.walk(tree)) > MAX_NODES:
            return None
        value = _value(tree.body, Context(prec=digits, Emax=digits, Emin=-digits))
    except (SyntaxError, ValueError, DecimalException, ArithmeticError, RecursionError, MemoryError):
        return None
    return value if value.is_finite() else None


def shown(value: Decimal) -> str:
    """Without an exponent, without zeros at the end, at most twelve places after the point."""
    rounded = f"{value:.12f}"
    return rounded.rstrip("0").rstrip(".") if "." in rounded else rounded


def _value(node: ast.expr, context: Context) -> Decimal:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return context.create_decimal(ast.unparse(node))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        inner = _value(node.operand, context)
        return context.minus(inner) if isinstance(node.op, ast.USub) else inner
    if not isinstance(node, ast.BinOp):
        raise ValueError("not arithmetic")
    left, right = _value(node.left, context), _value(node.right, context)
    match node.op:
        case ast.Add():
            return context.add(left, right)
        case ast.Sub():
            return context.subtract(left, right)
        case ast.Mult():
            return context.multiply(left, right)
        case ast.Div():
            return context.divide(left, right)
        case ast.FloorDiv():
            return (left / right).to_integral_value("ROUND_FLOOR")
        case ast.Mod():
            return left - right * (left / right).to_integral_value("ROUND_FLOOR")
        case ast.Pow():
            if abs(right) > MAX_EXPONENT:
                raise Overflow
            return context.power(left, right)
    raise ValueError("not arithmetic")
