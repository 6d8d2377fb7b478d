"""The project's limits that no linter knows: sizes, banned constructs without exemption, import cycles.

Run as `python scripts/check_limits.py [folder of the package]`. Prints one line a breach; exit status 1 if any.
"""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

FILE_LINES = 400
FUNCTION_LINES = 60  # without its docstring: that one should be as long as it needs to be
SETTINGS = 10
BROAD = {"Exception", "BaseException"}
# Extras that users may not have, or that are slow to import. One file may import torch.ao, for its operator schemas.
NEVER_AT_IMPORT = ("torchvision", "timm", "transformers", "datasets", "pyarrow", "PIL")
ONLY_ONCE = "torch.ao"

Function = ast.FunctionDef | ast.AsyncFunctionDef


def breaches(package: Path) -> Iterator[str]:
    """One line for each limit that a file of the package breaks."""
    trees = {path: ast.parse(path.read_text(encoding="utf8")) for path in sorted(package.rglob("*.py"))}
    for path, tree in trees.items():
        lines = len(path.read_text(encoding="utf8").splitlines())
        if lines > FILE_LINES:
            yield f"{path}:{FILE_LINES + 1}: {lines} lines, at most {FILE_LINES}"
        for node in ast.walk(tree):
            for text in node_breaches(node):
                yield f"{path}:{getattr(node, 'lineno', 1)}: {text}"
        for node in module_level(tree):
            for name in imported(node, ""):
                if name.split(".")[0] in NEVER_AT_IMPORT:
                    yield f"{path}:{node.lineno}: imports {name} at module level; import it where it is used"
    users = [
        path
        for path, tree in trees.items()
        if any(f"{name}.".startswith(f"{ONLY_ONCE}.") for node in ast.walk(tree) for name in imported(node, ""))
    ]
    for path in users[1:]:
        yield f"{path}:1: imports {ONLY_ONCE}, which is for {users[0]} alone"
    cycle = import_cycle(package, trees)
    if cycle:
        yield f"{package}:1: import cycle: {' -> '.join(cycle)}"


def node_breaches(node: ast.AST) -> Iterator[str]:
    """What is wrong with one node of a syntax tree."""
    if isinstance(node, Function):
        lines = function_lines(node)
        if lines > FUNCTION_LINES:
            yield f"{node.name} has {lines} lines without its docstring, at most {FUNCTION_LINES}"
        count = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs) - 1
        if node.name == "__init__" and count > SETTINGS:
            yield f"__init__ takes {count} arguments, at most {SETTINGS}"
    elif isinstance(node, ast.ClassDef) and any(dotted(item) == "settings" for item in node.decorator_list):
        count = sum(isinstance(item, ast.AnnAssign) for item in node.body)
        if count > SETTINGS:
            yield f"{node.name} has {count} settings, at most {SETTINGS}; group related ones in a small frozen value"
    elif isinstance(node, ast.ExceptHandler):
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        broad = any(item is None or dotted(item) in BROAD for item in caught)
        if broad and not isinstance(node.body[-1], ast.Raise):
            yield "broad except that does not raise: name what can be handled here"
    elif isinstance(node, ast.Assert):
        yield "assert: raise an error of pared.errors"
    elif isinstance(node, ast.Call) and dotted(node.func) == "print":
        yield "print in the library: return text, or write to the caller's console"


def function_lines(node: Function) -> int:
    """Lines of a function, without its docstring and decorators."""
    first = node.body[0]
    has_docstring = ast.get_docstring(node) is not None
    docstring = (first.end_lineno or 0) - first.lineno + 1 if has_docstring else 0
    return (node.end_lineno or 0) - node.lineno + 1 - docstring


def dotted(node: ast.expr | None) -> str:
    return ast.unparse(node) if isinstance(node, (ast.Name, ast.Attribute)) else ""


def module_level(tree: ast.AST) -> Iterator[ast.stmt]:
    """Statements that run at import: everything outside functions and `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function) or not isinstance(node, (ast.stmt, ast.ExceptHandler)):
            continue
        if isinstance(node, ast.If) and dotted(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.stmt):
            yield node
        yield from module_level(node)


def imported(node: ast.AST, module: str) -> Iterator[str]:
    """Names that an import statement loads; `from a import b` gives both `a` and `a.b`, as b may be a module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        source = node.module or ""
        if node.level:
            source = ".".join([*module.split(".")[: -node.level], *([source] if source else [])])
        yield source
        yield from (f"{source}.{alias.name}" for alias in node.names)


def import_cycle(package: Path, trees: dict[Path, ast.Module]) -> list[str]:
    """The modules of an import cycle at module level, or nothing."""
    names = {path: module_name(package, path) for path in trees}
    known = set(names.values())
    graph: dict[str, set[str]] = {}
    for path, tree in trees.items():
        # A package is looked up as its own `__init__`, so that a relative import starts from the right folder.
        inside = f"{names[path]}.__init__" if path.name == "__init__.py" else names[path]
        found = {name for node in module_level(tree) for name in imported(node, inside)}
        # Importing a.b.c runs a and a.b too, but those around the importer are running already.
        parents = {".".join(name.split(".")[:i]) for name in found for i in range(1, name.count(".") + 1)}
        around = {names[path], *(p for p in parents if names[path].startswith(f"{p}."))}
        graph[names[path]] = ((found | parents) & known) - around
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(reversed(error.args[1]))
    return []


def module_name(package: Path, path: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def main(arguments: list[str]) -> int:
    package = Path(arguments[0]) if arguments else Path(__file__).parent.parent / "src" / "pared"
    found = list(breaches(package))
    for line in found:
        print(line)
    print(f"limits: {len(found)} broken" if found else "limits: all held")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
