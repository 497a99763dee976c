"""Static: the file parses, follows the published contract, and imports only what a candidate may.

Proves: there is a class DeltaNet whose constructor takes keywords beyond its own (`**kwargs`), and whose forward
takes what the block passes. More arguments than the reference's are fine. How: the syntax tree; nothing is executed.
Cannot see: what code does. It is a lint that explains early and cheaply, not a boundary: the sandbox is the boundary.
Exact, so there is no tolerance.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator, Sequence

from common.records import CheckOutcome
from training.programs import MAX_BYTES
from training.scorer.verifier.context import failed, passed

__all__ = ["ALLOWED", "NAME", "Problem", "imported_names", "parse", "refused_for", "run"]

NAME = "static"
ALLOWED = ("__future__", "dataclasses", "einops", "fla", "functools", "math", "torch", "typing")
"""Packages a candidate may import; transformers too under TYPE_CHECKING."""

_DENIED = {
    "torch.distributed": "a mixer runs in one process",
    "torch.hub": "nothing can be downloaded",
    "torch.multiprocessing": "a mixer runs in one process",
    "torch.utils.cpp_extension": "write it with torch operations",
    "fla.layers": "only fla.layers.utils; write the layer itself",
    "fla.models": "only under TYPE_CHECKING",
}
_ALTERNATIVE = {
    "numpy": "use torch",
    "scipy": "use torch",
    "collections": "use dict and list, or typing.NamedTuple",
    "warnings": "raise ValueError, or leave the warning out",
    "triton": "write it with torch operations, so that it also runs without a GPU",
    "causal_conv1d": "use fla.modules.ShortConvolution or torch.nn.functional.conv1d with left padding",
    "os": "a mixer needs no operating system",
    "sys": "a mixer needs no operating system",
    "copy": "build new objects",
    "abc": "use plain classes",
    "enum": "use string constants",
    "transformers": "import it under `if TYPE_CHECKING:` only",
    "random": "use torch's generator",
    "itertools": "write the loop",
}
_FORWARD = ("hidden_states", "attention_mask", "past_key_values", "use_cache", "output_attentions")


def run(text: str) -> CheckOutcome:
    """The outcome for a program's text; the counterexample names the line and what to do."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        return failed(NAME, f"expected at most {MAX_BYTES} bytes, got {len(text)} characters")
    try:
        tree = parse(text)
    except SyntaxError as error:
        source = (error.text or "").strip()[:200]
        place = "" if error.lineno is None else f" (line {error.lineno})"
        return failed(NAME, f"syntax error: {error.msg}{place}", {"line": error.lineno, "source": source})
    except (ValueError, RecursionError, MemoryError) as error:
        return failed(NAME, f"cannot be parsed: {error or type(error).__name__}")
    problems = [*_imports(tree), *_contract(tree)]
    if not problems:
        return passed(NAME, "follows the contract; imports only what is allowed")
    return refused_for(NAME, problems)


Problem = tuple[int, str, str]
"""(line, what is wrong there, what to do instead)."""


def parse(text: str) -> ast.Module:
    """The syntax tree, without Python's warnings about the text. Raises as ast.parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text)


def refused_for(name: str, problems: Sequence[Problem]) -> CheckOutcome:
    """The refusal of check `name`: the first problem in words, up to eight of them in the counterexample."""
    line, problem, fix = problems[0]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    listed = [{"line": number, "problem": what, "instead": how} for number, what, how in problems[:8]]
    return failed(name, f"line {line}: {problem}{more}; {fix}", {"line": line, "problems": listed})


def imported_names(node: ast.Import | ast.ImportFrom) -> list[str]:
    """What the statement imports, by dotted names."""
    module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
    return [module + alias.name for alias in node.names]


def _imports(tree: ast.Module) -> Iterator[Problem]:
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, "relative import", "a candidate is one file: define it here"
            continue
        for name in imported_names(node):
            root = name.split(".")[0]
            if id(node) in guarded and root in (*ALLOWED, "transformers"):
                continue
            denied = next((key for key in _DENIED if name == key or name.startswith(key + ".")), None)
            if denied == "fla.layers" and name.startswith("fla.layers.utils"):
                denied = None
            if denied is not None:
                yield node.lineno, f"imports {denied}", _DENIED[denied]
            elif root not in ALLOWED:
                alternative = _ALTERNATIVE.get(root, f"allowed are {', '.join(ALLOWED)}")
                yield node.lineno, f"imports {root}", alternative


def _contract(tree: ast.Module) -> Iterator[Problem]:
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "DeltaNet"]
    if not classes:
        yield 1, "there is no class DeltaNet", "define `class DeltaNet(nn.Module)` at the top level"
        return
    found = classes[-1]
    methods = {node.name: node for node in found.body if isinstance(node, ast.FunctionDef)}
    if not found.bases:
        yield found.lineno, "class DeltaNet has no base", "write `class DeltaNet(nn.Module)`"
    constructor, forward = methods.get("__init__"), methods.get("forward")
    if constructor is None or forward is None:
        missing = "__init__" if constructor is None else "forward"
        yield found.lineno, f"class DeltaNet has no {missing}", f"define {missing}"
        return
    for method in (constructor, forward):
        if method.args.kwarg is None:
            yield method.lineno, f"{method.name} takes no **kwargs", "end its arguments with **kwargs"
    names = _arguments(constructor)
    if "hidden_size" not in names and "d_model" not in names:
        yield constructor.lineno, "__init__ takes neither hidden_size nor d_model", "take both, d_model overriding"
    if "num_heads" not in names:
        yield constructor.lineno, "__init__ has no argument num_heads", "take num_heads=4"
    given = _arguments(forward)
    if "hidden_states" not in given:
        yield forward.lineno, "forward has no argument hidden_states", f"take {', '.join(_FORWARD)} and **kwargs"
    needed = _required(forward) - {"self", "hidden_states"}
    if needed:
        yield (
            forward.lineno,
            f"forward requires {', '.join(sorted(needed))}",
            "give every argument but hidden_states a default",
        )
    required = _required(constructor) - {"self"}
    if required:
        yield constructor.lineno, f"__init__ requires {', '.join(sorted(required))}", "give every argument a default"


def _arguments(method: ast.FunctionDef) -> set[str]:
    arguments = method.args
    return {item.arg for item in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}


def _required(method: ast.FunctionDef) -> set[str]:
    arguments = method.args
    positional = [*arguments.posonlyargs, *arguments.args]
    without = positional[: len(positional) - len(arguments.defaults)]
    keyword = [
        item for item, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if default is None
    ]
    return {item.arg for item in (*without, *keyword)}
