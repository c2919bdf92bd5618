"""The source of a method as a tree, and what of it cannot run: branches that flags of the module decide."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any


class Source:
    """A function of `self`: its tree, what each node in it stands in, and the line before its first."""

    def __init__(self, tree: ast.FunctionDef | ast.Lambda, before: int) -> None:
        self.tree, self.before = tree, before
        self.parent = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        self.self_name = [*tree.args.posonlyargs, *tree.args.args][0].arg

    def is_self(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id == self.self_name

    def call_of(self, node: ast.AST) -> ast.Call | None:
        """The call of what `node` is, where that is all that is done with it."""
        outer = self.parent[node]
        return outer if isinstance(outer, ast.Call) and outer.func is node else None

    def alive(self, flags: Mapping[str, Any]) -> list[ast.AST]:
        """All nodes but those in branches not taken: of `if self.flag` for a flag of the module, as checkpointing."""
        dead = set[ast.AST]()
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.If, ast.IfExp)) and (known := self._truth(node.test, flags)) is not None:
                never = node.orelse if known else node.body
                dead.update(n for branch in (never if isinstance(never, list) else [never]) for n in ast.walk(branch))
        return [n for n in ast.walk(self.tree) if n not in dead]

    def _truth(self, test: ast.expr, flags: Mapping[str, Any]) -> bool | None:
        """The truth of a test that `flags` decide."""
        if isinstance(test, ast.BoolOp):
            values = [self._truth(v, flags) for v in test.values]
            decisive = isinstance(test.op, ast.Or)
            if decisive in values:
                return decisive
            return None if None in values else not decisive
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self._truth(test.operand, flags)
            return None if inner is None else not inner
        if isinstance(test, ast.Attribute) and self.is_self(test.value):
            flag = flags.get(test.attr)
            return flag if isinstance(flag, bool) else None
        if isinstance(test, ast.Call) and ast.unparse(test.func) in ("torch.jit.is_scripting", "torch.jit.is_tracing"):
            return False
        return None


def source_of(function: Any) -> Source | None:
    """The source of a function; None where it is not there, or the function has no self."""
    try:
        if function.__name__ == "<lambda>":
            return _lambda(function)
        lines, first = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines))).body[0]
    except (OSError, TypeError, SyntaxError):  # built at run time, typed at a prompt, in C, or part of an expression
        return None
    plain = isinstance(tree, ast.FunctionDef) and (tree.args.posonlyargs or tree.args.args)
    return Source(tree, first - 1) if plain and isinstance(tree, ast.FunctionDef) else None


def _lambda(function: Any) -> Source | None:
    """The one lambda with these parameters on its line of the file."""
    code = function.__code__
    tree = ast.parse("".join(inspect.findsource(function)[0]))
    here = [n for n in ast.walk(tree) if isinstance(n, ast.Lambda) and n.lineno == code.co_firstlineno]
    named = [n for n in here if [a.arg for a in n.args.args] == [*code.co_varnames[: code.co_argcount]]]
    return Source(named[0], 0) if len(named) == 1 and code.co_argcount else None


def arguments(call: ast.Call) -> int | None:
    """How many positional arguments a call has; None with keywords or a star."""
    plain = not call.keywords and not any(isinstance(a, ast.Starred) for a in call.args)
    return len(call.args) if plain else None


def name_called(node: ast.AST | None) -> str:
    """`f` for the call `f(...)` of a plain name."""
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def compared_with_is(node: ast.AST) -> bool:
    return isinstance(node, ast.Compare) and all(isinstance(o, (ast.Is, ast.IsNot)) for o in node.ops)


def elements(target: ast.expr, source: ast.expr) -> Iterator[ast.Name]:
    """The names in a loop's target that are modules: not the number or the name that comes before them."""
    method = source.func.attr if isinstance(source, ast.Call) and isinstance(source.func, ast.Attribute) else ""
    counted = name_called(source) == "enumerate" or method in ("items", "named_children")
    pair = counted and isinstance(target, ast.Tuple) and len(target.elts) == 2
    inner = target.elts[1] if pair and isinstance(target, ast.Tuple) else target
    return (n for n in ast.walk(inner) if isinstance(n, ast.Name))
