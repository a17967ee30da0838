"""A new MLflow that lacks what flowbuffer uses of its insides is noticed here, with words."""

import ast
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import mlflow
import pytest

import flowbuffer
from flowbuffer.dropin.private_names import CHECKED_IN, PRIVATE_NAMES

SOURCE = Path(flowbuffer.__file__).parent
#: Modules whose names MLflow documents.
PUBLIC = {"mlflow", "mlflow.entities", "mlflow.exceptions", "mlflow.tracking"}
#: Private names of other packages than MLflow.
OTHERS = {
    *("_asdict", "_replace", "_data", "_exit", "_current_frames", "_is_gil_enabled"),
    *("_sock", "_get_running_loop"),
}


def is_there(name: str) -> bool:
    """Whether the MLflow that is installed has one of the names of the list."""
    module, _, path = name.partition(":")
    if find_spec(module) is None:
        return False
    found: object = import_module(module)
    path, _, attribute = path.partition("#")
    for part in path.split("."):
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return not attribute or f"self.{attribute}" in inspect.getsource(found)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_mlflow_has_it(name: str) -> None:
    """Each private name that is used is there."""
    if name.startswith("azureml."):
        pytest.importorskip("azureml.mlflow")
    newer = "" if mlflow.__version__ in CHECKED_IN else f" (it was checked in {CHECKED_IN})"
    assert is_there(name), (
        f"MLflow {mlflow.__version__} lacks {name}{newer}; it is used for: {PRIVATE_NAMES[name]}"
    )


def used() -> Iterator[tuple[str, str]]:
    """Names of MLflow's insides in the sources, and where."""
    trees = {path: ast.parse(path.read_text()) for path in SOURCE.rglob("*.py")}
    own = {
        name
        for tree in trees.values()
        for node in ast.walk(tree)
        for name in (
            getattr(node, "name", None),
            node.id if isinstance(node, ast.Name) else None,
            node.arg if isinstance(node, ast.arg) else None,
            node.attr
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in ("self", "cls")
            else None,
        )
        if name
    }
    is_foreign = re.compile(rf"_(?!_)(?!({'|'.join(n[1:] for n in own | OTHERS if n[0] == '_')})$)")
    for path, tree in trees.items():
        if path.name == "private_names.py":
            continue
        for node in ast.walk(tree):
            where = f"{path.relative_to(SOURCE)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlflow."):
                if node.module not in PUBLIC:
                    yield from ((f"{node.module}:{one.name}", where) for one in node.names)
            elif isinstance(node, ast.Attribute) and is_foreign.match(node.attr):
                yield node.attr, where


def is_listed(name: str) -> bool:
    module, _, attribute = name.rpartition(":")
    if module:
        begins = (f"{name}.", f"{name}#", f"{module}.{attribute}:")  # it may be a module itself
        return name in PRIVATE_NAMES or any(n.startswith(begins) for n in PRIVATE_NAMES)
    return any(n.replace("#", ":").endswith((f":{name}", f".{name}")) for n in PRIVATE_NAMES)


def test_the_list_is_whole() -> None:
    """No private name of MLflow's is used that is not in the list."""
    missing = [f"{name} ({where})" for name, where in used() if not is_listed(name)]
    assert missing == [], "to be added to dropin/private_names.py"


def test_what_is_not_there_is_found() -> None:
    """The look itself can fail."""
    assert not is_there("mlflow.tracking.client:MlflowClient.no_such_method")
    assert not is_there("mlflow.no_such_module:anything")
    assert not is_there("mlflow.tracking.client:MlflowClient#_no_such_attribute")
    assert not is_listed("mlflow.utils:_no_such_name")
