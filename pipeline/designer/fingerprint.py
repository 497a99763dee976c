"""A hash of what a program does in structure: blind to names, comments, docstrings, annotations and literals.

Two texts with one fingerprint are the same program up to renaming and constants. The reverse does not hold: statements
in another order, or the same sum written in another way, give another fingerprint.
"""

from __future__ import annotations

import ast
import hashlib
import warnings
from functools import lru_cache

from common.errors import UsageError

__all__ = ["fingerprint"]

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_NAMED_BY_WALKER = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_REGISTER = ("register_buffer", "register_parameter", "register_module", "add_module")
_SKIPPED_FIELDS = (
    "annotation",
    "returns",
    "type_comment",
    "ctx",
    "kind",
    "type_params",
    "is_async",
    "simple",
    "type_ignores",
)


@lru_cache(maxsize=256)  # a parent is compared again with every new design
def fingerprint(program: str) -> str:
    """SHA-256 in hex of the program's syntax tree after consistent renaming of everything the program itself names.

    Locals, parameters, functions, classes and attributes of self are numbered in the order in which they appear; names
    that come from imports are resolved to what was imported (`F.silu` and `functional.silu` agree).

    Raises:
        UsageError: the text is not Python, with line and column.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in a candidate's strings are not our concern
            tree = ast.parse(program)
    except SyntaxError as error:
        where = f"line {error.lineno}, column {error.offset}"
        raise UsageError(
            f"expected a Python program, got a syntax error at {where}: {error.msg}", "correct that line"
        ) from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise UsageError(f"expected a Python program, got text that cannot be parsed: {error}") from error
    try:
        return hashlib.sha256("\n".join(_Walker(tree).tokens).encode("utf-8", "surrogatepass")).hexdigest()
    except RecursionError as error:
        raise UsageError("expected a Python program, got one nested too deeply to compare") from error


class _Walker:
    """Turns a tree into tokens. One number series for each function scope, one for attributes of self."""

    def __init__(self, tree: ast.Module) -> None:
        self.imports = _imports(tree)
        self.attributes = _own_attributes(tree)
        self.functions = {
            node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        self.attribute_numbers: dict[str, int] = {}
        self.keyword_numbers: dict[str, int] = {}
        self.scopes: list[tuple[set[str], dict[str, int]]] = [(_bound(tree) - set(self.imports), {})]
        self.tokens: list[str] = []
        self.walk(tree)

    def name(self, identifier: str) -> str:
        for depth in range(len(self.scopes) - 1, -1, -1):
            bound, numbers = self.scopes[depth]
            if identifier in bound:
                return f"name {depth}.{numbers.setdefault(identifier, len(numbers))}"
        return f"global {self.imports.get(identifier, identifier)}"

    def attribute(self, identifier: str) -> str:
        return f"own {self.attribute_numbers.setdefault(identifier, len(self.attribute_numbers))}"

    def walk(self, node: ast.AST) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom) or _is_literal_statement(node):
            return
        if isinstance(node, ast.Constant | ast.JoinedStr) or _is_signed_literal(node):
            self.tokens.append("literal")
        elif isinstance(node, ast.Name):
            self.tokens.append(self.name(node.id))
        elif isinstance(node, ast.Attribute):
            self._attribute(node)
        elif isinstance(node, ast.AnnAssign):
            if node.value is not None:  # `x: T = v` reads as `x = v`, a bare annotation as nothing
                self.walk(ast.Assign(targets=[node.target], value=node.value))
        elif isinstance(node, ast.Call):
            self._call(node)
        elif isinstance(node, _FUNCTIONS):
            self._function(node)
        elif isinstance(node, _COMPREHENSIONS):
            self._scoped(node, {n.id for g in node.generators for n in _stored(g.target)})
        else:
            if isinstance(node, ast.ClassDef):
                self.tokens.append(self.name(node.name))
            self._fields(node)

    def _fields(self, node: ast.AST) -> None:
        self.tokens.append(f"({type(node).__name__}")
        for field, value in ast.iter_fields(node):
            if field in _SKIPPED_FIELDS or (field == "name" and isinstance(node, _NAMED_BY_WALKER)):
                continue
            self.tokens.append(f".{field}")
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, ast.AST):
                    self.walk(item)
                elif item is not None:
                    self.tokens.append(self.name(item) if isinstance(item, str) else repr(item))
        self.tokens.append(")")

    def _scoped(self, node: ast.AST, bound: set[str]) -> None:
        self.scopes.append((bound, {}))
        self._fields(node)
        self.scopes.pop()

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        bound = {argument.arg for argument in _arguments(node.args)}
        if not isinstance(node, ast.Lambda):
            own = node.name in self.attributes
            self.tokens.append(self.attribute(node.name) if own else self.name(node.name))
            bound |= _bound(node)
        self._scoped(node, bound - _declared_elsewhere(node))

    def _attribute(self, node: ast.Attribute) -> None:
        path = _dotted(node, self.imports)
        if path is not None:
            self.tokens.append(f"global {path}")
            return
        self.tokens.append("(Attribute")
        self.walk(node.value)
        own = _is_self(node.value) and node.attr in self.attributes
        self.tokens += [self.attribute(node.attr) if own else node.attr, ")"]

    def _call(self, node: ast.Call) -> None:
        """Keyword names are the program's own only where it calls a function of its own."""
        called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        local = called in self.functions
        self.tokens.append("(Call")
        for part in (node.func, *node.args):
            self.walk(part)
        for keyword in node.keywords:
            word = keyword.arg or "**"
            if local and keyword.arg:
                word = str(self.keyword_numbers.setdefault(keyword.arg, len(self.keyword_numbers)))
            self.tokens.append(f"keyword {word}")
            self.walk(keyword.value)
        self.tokens.append(")")


def _imports(tree: ast.Module) -> dict[str, str]:
    """Local name -> what it stands for, of every import in the program."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module or ''}.{alias.name}"
    return found


def _own_attributes(tree: ast.Module) -> set[str]:
    """Attributes that the program gives to self: assigned, registered by name, or methods."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _REGISTER:
            if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                found.add(node.args[0].value)
        elif isinstance(node, ast.ClassDef):
            found |= {item.name for item in node.body if isinstance(item, ast.FunctionDef)} - {"__init__", "forward"}
    return found


def _bound(scope: ast.AST) -> set[str]:
    """Names bound directly in a function or module, not in functions nested in it."""
    found: set[str] = set()
    stack = list(ast.iter_child_nodes(scope))
    while stack:
        node = stack.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
            if not isinstance(node, ast.ClassDef):
                continue
        if isinstance(node, (ast.Lambda, *_COMPREHENSIONS)):
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
            found.add(node.id)
        if isinstance(node, ast.ExceptHandler) and node.name:
            found.add(node.name)
        stack.extend(ast.iter_child_nodes(node))
    return found


def _declared_elsewhere(node: ast.AST) -> set[str]:
    return {name for item in ast.walk(node) if isinstance(item, ast.Global | ast.Nonlocal) for name in item.names}


def _arguments(arguments: ast.arguments) -> list[ast.arg]:
    star = [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *star]


def _stored(target: ast.AST) -> list[ast.Name]:
    return [node for node in ast.walk(target) if isinstance(node, ast.Name)]


def _dotted(node: ast.Attribute, imports: dict[str, str]) -> str | None:
    """The full path of `module.name`, where the chain starts at an import; else None."""
    parts: list[str] = []
    current: ast.AST = node
    while isinstance(current, ast.Attribute):
        parts.append(current.attr)
        current = current.value
    if not isinstance(current, ast.Name) or current.id not in imports:
        return None
    return ".".join([imports[current.id], *reversed(parts)])


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _is_literal_statement(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_signed_literal(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.UnaryOp)
        and isinstance(node.op, ast.USub | ast.UAdd)
        and isinstance(node.operand, ast.Constant)
    )
