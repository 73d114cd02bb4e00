"""Arithmetic over named numbers, for derived values of a space: `derive: "train.batch_tokens / 128"`.

Text is parsed by Python's own parser and walked here: numbers, names (dotted ones too), `+ - * / // % **` and a few
functions. Nothing is ever handed to `eval`, and a power cannot make a number larger than a float holds.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from tigerbot.errors import SpecError

_TWO: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_ONE: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "min": min,
    "max": max,
    "abs": abs,
    "round": round,
    "int": int,
    "ceil": math.ceil,
    "floor": math.floor,
    "sqrt": math.sqrt,
    "log": math.log,
    "log2": math.log2,
    "exp": math.exp,
}


class Expression:
    """One expression.

    Args:
        text: what the spec says.
        where: the field it stands at, for messages.

    Raises:
        SpecError: it is no arithmetic.
    """

    def __init__(self, text: Any, where: str) -> None:
        self._text, self._where = str(text), where
        try:
            self._tree = ast.parse(self._text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise self._refused("is not an expression") from None
        self.names = frozenset(self._names(self._tree))

    def value(self, values: Mapping[str, Any]) -> Any:
        """The number it comes to.

        Raises:
            SpecError: it divides by zero, or a value in it is no number.
        """
        try:
            return self._of(self._tree, values)
        except (ArithmeticError, ValueError, TypeError) as error:
            known = {name: values[name] for name in sorted(self.names)}
            raise self._refused(f"has no value for {known} ({error})") from None

    def _names(self, node: ast.AST) -> list[str]:
        match node:
            case ast.Name() | ast.Attribute():
                return [self._dotted(node)]
            case ast.Constant(value=int() | float()):
                return []
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _TWO or isinstance(op, ast.Pow):
                return self._names(left) + self._names(right)
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _ONE:
                return self._names(operand)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS and args:
                return [found for arg in args for found in self._names(arg)]
        allowed = f"numbers, names, + - * / // % ** and {', '.join(_FUNCTIONS)}"
        raise self._refused(f"holds {ast.unparse(node)!r}, wants {allowed}")

    def _dotted(self, node: ast.expr) -> str:
        if isinstance(node, ast.Name):
            return node.id
        if isinstance(node, ast.Attribute):
            return f"{self._dotted(node.value)}.{node.attr}"
        raise self._refused(f"holds {ast.unparse(node)!r}, wants a field's name")

    def _of(self, node: ast.expr, values: Mapping[str, Any]) -> Any:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.BinOp(left=left, op=ast.Pow(), right=right):
                return _power(self._of(left, values), self._of(right, values))
            case ast.BinOp(left=left, op=op, right=right):
                return _TWO[type(op)](self._of(left, values), self._of(right, values))
            case ast.UnaryOp(op=op, operand=operand):
                return _ONE[type(op)](self._of(operand, values))
            case ast.Call(func=ast.Name(id=name), args=args):
                return _FUNCTIONS[name](*(self._of(arg, values) for arg in args))
        value = values[self._dotted(node)]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{self._dotted(node)} is {value!r}")
        return value

    def _refused(self, what: str) -> SpecError:
        return SpecError(f"derive: {self._text!r} {what}", where=self._where, fix='e.g. "train.batch_tokens / 128"')


def _power(base: Any, exponent: Any) -> Any:
    size = math.pow(base, exponent)  # a float first: whole numbers would grow until memory is gone
    whole = isinstance(base, int) and isinstance(exponent, int) and exponent >= 0
    return base**exponent if whole and abs(size) < 2**53 else size
