"""House rules that a machine can check over the product's own files."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("engine", "kernels", "scheduler", "transfer", "server")
FUNCTION_LINES_MAX = 60
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "pickle.loads", "recv_pyobj"}
READS_ENVIRONMENT = {"server/serve.py", "server/engine_flags.py", "server/spawn.py"}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text("utf-8"))


def test_nothing_unpickles_or_evaluates() -> None:
    bad = []
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported = {(node.module or "").split(".")[0]}
            else:
                imported = set()
            if imported & FORBIDDEN_MODULES:
                bad.append(f"{name}:{node.lineno}")
            if isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN_CALLS:
                bad.append(f"{name}:{node.lineno} {ast.unparse(node.func)}")
    assert not bad, bad


def test_every_module_says_what_it_is() -> None:
    assert not [name for name, tree in modules() if not ast.get_docstring(tree)]


def test_a_function_fits_on_a_screen() -> None:
    long = [
        f"{name}:{node.lineno} {node.name}"
        for name, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno >= FUNCTION_LINES_MAX
    ]
    assert not long, long


def test_the_environment_is_read_at_the_front_door_only() -> None:
    bad = [
        f"{name}:{node.lineno}"
        for name, tree in modules()
        if name not in READS_ENVIRONMENT
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv")
    ]
    assert not bad, bad


def test_no_bare_except_but_at_the_roots_of_processes() -> None:
    """What is caught has a name; catching all belongs where a process begins."""
    bad = [
        f"{name}:{node.lineno}"
        for name, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert not bad, bad
