"""Who asks a traced value something, and what becomes of the answer, read off the frame that asks.

Python lets a value neither see `is`, nor tell `f"{x}"` in the text of an error from one that decides something. What
the source says on the asking line tells, and where it does not the question counts as one that decides.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import itertools
import linecache
import sys
import textwrap
from types import CodeType, FrameType

_LIBRARIES = ("torch", "fxfuse", "copy", "weakref")
_MESSAGES = {"_assert", "warn", "warning", "info", "debug", "error", "exception", "print", "warn_once"}


def user_frame(depth: int = 2) -> FrameType | None:
    """The frame that asks, `depth` above here; None where it is one of torch or of this library."""
    frame = sys._getframe(depth)
    return None if _of_library(frame) else frame


def nearest_line(depth: int = 2) -> tuple[str, int] | None:
    """File and line of the innermost frame of the user's, from `depth` above here on."""
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None and _of_library(frame):
        frame = frame.f_back
    return None if frame is None else (frame.f_code.co_filename, frame.f_lineno)


def _of_library(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] in _LIBRARIES


def unpacked(frame: FrameType) -> int | None:
    """How many values the line takes: `b, c, h, w = x.shape`; None where it iterates in another way."""
    here = next((i for i in dis.get_instructions(frame.f_code) if i.offset == frame.f_lasti), None)
    return int(here.argval) if here is not None and here.opname == "UNPACK_SEQUENCE" else None


def calls_isinstance(frame: FrameType) -> bool:
    """Whether what the frame calls just now is `isinstance`, and not a function in C that reads the class of a value.

    The two must not get the same answer: C code takes what says that it is a tensor for one, down to its memory.
    """
    code, line, column = frame.f_code, frame.f_lineno, 0
    if sys.version_info >= (3, 11):
        position = next(itertools.islice(code.co_positions(), frame.f_lasti // 2, None), (None,) * 4)
        line, column = position[0] or line, position[2] or 0
    text = linecache.getline(code.co_filename, line)
    if sys.version_info >= (3, 11):
        text = text.encode()[column:].decode(errors="replace").partition("(")[0] + "("
    return "isinstance(" in text


def for_a_message(frame: FrameType) -> bool:
    """Whether the line makes the text of an assertion, an error or a warning."""
    return frame.f_lineno in _message_lines(frame.f_code)


def by_identity(frame: FrameType) -> bool:
    """Whether the function compares anything but None, True and False by `is`, or looks it up in a container."""
    return _identities(frame.f_code)


def asks_attribute(frame: FrameType) -> bool:
    """Whether the line says `hasattr` or `getattr`, which turn a missing attribute into an answer."""
    return frame.f_lineno in _attribute_lines(frame.f_code)


@functools.cache
def matches(code: CodeType) -> bool:
    """Whether a function has a `match` statement, or asks for the `type` of one of its arguments."""
    found = list(dis.get_instructions(code))
    if any(i.opname in ("MATCH_CLASS", "MATCH_MAPPING", "MATCH_SEQUENCE") for i in found):
        return True
    named = [i for i in found if i.opname not in ("PUSH_NULL", "PRECALL", "CACHE", "RESUME")]
    own = code.co_varnames[0] if code.co_argcount else ""
    return any(
        a.opname == "LOAD_GLOBAL"
        and a.argval == "type"
        and b.opname.startswith("LOAD_FAST")
        and b.argval != own
        and c.opname.startswith("CALL")
        for a, b, c in zip(named, named[1:], named[2:], strict=False)
    )


@functools.cache
def _identities(code: CodeType) -> bool:
    before = None
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if name in ("EXTENDED_ARG", "CACHE"):
            continue
        plain = before is not None and before.opname == "LOAD_CONST" and isinstance(before.argval, (bool, type(None)))
        if name == "IS_OP" and not plain:
            return True
        before = instruction
    return False


@functools.cache
def _tree(code: CodeType) -> ast.AST | None:
    try:
        lines, first = inspect.getsourcelines(code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError, TypeError):  # made at run time, or a piece of an expression
        return None
    return ast.increment_lineno(tree, first - 1)


@functools.cache
def _message_lines(code: CodeType) -> frozenset[int]:
    found = set[int]()
    for node in ast.walk(_tree(code) or ast.Module([], [])):
        texts: list[ast.expr | None] = []
        if isinstance(node, ast.Assert):
            texts = [node.msg]
        elif isinstance(node, ast.Raise):
            texts = [node.exc]
        elif isinstance(node, ast.Call) and _name(node.func) in _MESSAGES:
            texts = [*node.args[1 if _name(node.func) == "_assert" else 0 :], *(k.value for k in node.keywords)]
        for text in texts:
            if text is not None:
                found.update(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    return frozenset(found)


@functools.cache
def _attribute_lines(code: CodeType) -> frozenset[int]:
    if {"hasattr", "getattr"}.isdisjoint(code.co_names):
        return frozenset()
    tree = _tree(code)
    if tree is None:
        return frozenset(line for _, _, line in code.co_lines() if line is not None)
    calls = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and _name(n.func) in ("hasattr", "getattr"))
    return frozenset(line for n in calls for line in range(n.lineno, (n.end_lineno or n.lineno) + 1))


def _name(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""
