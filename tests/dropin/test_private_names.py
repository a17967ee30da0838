"""A new MLflow that lacks what flowbuffer uses of its insides is noticed here, with words."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import mlflow
import pytest
from packaging.version import Version

import flowbuffer
from flowbuffer.dropin.private_names import CHECKED_IN, PRIVATE_NAMES

SOURCE = Path(flowbuffer.__file__).parent
#: Modules whose names MLflow documents.
PUBLIC = {"mlflow", "mlflow.entities", "mlflow.exceptions", "mlflow.tracking"}
#: Private names of other packages than MLflow.
OTHERS = {
    *("_asdict", "_replace", "_data", "_exit", "_current_frames", "_is_gil_enabled"),
    *("_sock", "_get_running_loop", "_register_atexit"),
}
VERSION = Version(mlflow.__version__)


def is_there(name: str) -> bool:
    """Whether the MLflow that is installed has one of the names of the list."""
    module, _, path = name.partition(":")
    if not is_module(module):
        return False
    found: object = import_module(module)
    path, _, attribute = path.partition("#")
    for part in path.split("."):
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    if not attribute:
        return True
    assert isinstance(found, type)
    sources = map(inspect.getsource, found.__mro__[:-1])
    return any(re.search(rf"\bself\.{attribute}\b.* = ", source) for source in sources)


def is_module(name: str) -> bool:
    """Whether a module of this name can be imported."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        return False


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_mlflow_has_it(name: str) -> None:
    """Each private name that is used is there."""
    use = PRIVATE_NAMES[name]
    if name.startswith("azureml."):
        pytest.importorskip("azureml.mlflow", reason="needs flowbuffer[azureml]")
    if not Version(use.since or "0") <= VERSION <= Version(use.until or "9999"):
        pytest.skip(f"MLflow {VERSION} need not have it")
    newer = "" if mlflow.__version__ in CHECKED_IN else f" (it was checked in {CHECKED_IN})"
    assert is_there(name), (
        f"MLflow {VERSION} lacks {name}{newer}, which {use.files} uses for: {use.purpose}"
    )


def last_part(name: str) -> str:
    """A name of the list without its module and class."""
    return re.split("[:.#]", name)[-1]


LISTED = {last_part(name) for name in PRIVATE_NAMES}


def of_itself(node: ast.AST) -> bool:
    """Whether it is an attribute of an object of ours: ``self.name``."""
    value = node.value if isinstance(node, ast.Attribute) else None
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def named_in(tree: ast.AST) -> set[str]:
    """What a file gives a name: functions, variables, arguments, attributes of its own objects."""
    names = set()
    for node in ast.walk(tree):
        names.add(getattr(node, "name", None))
        names.add(getattr(node, "id", None))
        names.add(getattr(node, "arg", None))
        names.add(node.attr if isinstance(node, ast.Attribute) and of_itself(node) else None)
    return {name for name in names if name}


def used_in(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """The modules and names of MLflow's insides in a file.

    A name that this package has, too (``own``), is only told if it is in the list; what has no
    underscore only if it is imported.
    """

    def is_foreign(name: str) -> bool:
        if not re.fullmatch(r"_[a-z]\w+", name) or name in OTHERS:
            return False
        return name not in own or name in LISTED

    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and re.match(r"(mlflow|azureml)\b", node.module or ""):
            for one in node.names:
                if is_module(f"{node.module}.{one.name}"):
                    yield f"{node.module}.{one.name}"
                elif node.module not in PUBLIC:
                    yield f"{node.module}:{one.name}"
        elif isinstance(node, ast.Attribute) and not of_itself(node) and is_foreign(node.attr):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            is_dotted = re.fullmatch(r"(mlflow|azureml)(\.\w+)+", text)
            if is_foreign(text) or (is_dotted and is_module(text)):
                yield text


def is_listed(name: str, file: str) -> bool:
    """Whether the list says that a file uses a name, or names of a module."""
    for one, use in PRIVATE_NAMES.items():
        if file in use.files.split():
            module = one.partition(":")[0]
            if name in (one, module, last_part(one)) or one.startswith((f"{name}.", f"{name}#")):
                return True
    return False


def sources() -> dict[str, ast.AST]:
    """The files of this package."""
    paths = [path for path in SOURCE.rglob("*.py") if path.name != "private_names.py"]
    return {path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text()) for path in paths}


def test_the_list_is_whole() -> None:
    """No private name of MLflow's is used that is not in the list, with the file that uses it."""
    pytest.importorskip("azureml.mlflow", reason="its modules are told apart only if it is there")
    trees = sources()
    own = set().union(*map(named_in, trees.values()))
    missing = {
        f"{name} in {file}"
        for file, tree in trees.items()
        for name in used_in(tree, own)
        if not is_listed(name, file)
    }
    assert missing == set(), "to be added to dropin/private_names.py"


def test_the_list_has_nothing_else() -> None:
    """What the list says that a file uses, that file uses."""
    texts = {file: ast.unparse(tree) for file, tree in sources().items()}
    gone = set()
    for name, use in PRIVATE_NAMES.items():
        package, _, module = name.partition(":")[0].rpartition(".")
        said = f"{package}.{module}", f"{package} import {module}"
        for file in use.files.split():
            text = texts.get(file, "")
            if not (re.search(rf"\b{last_part(name)}\b", text) or any(s in text for s in said)):
                gone.add(f"{name} in {file}")
    assert gone == set(), "to be taken out of dropin/private_names.py"


def test_what_is_not_there_is_found() -> None:
    """The look at MLflow itself can fail."""
    assert not is_there("mlflow.tracking.client:MlflowClient.no_such_method")
    assert not is_there("mlflow.no_such_module:anything")
    assert not is_there("mlflow.no_such_package.no_such_module:anything")
    assert not is_there("mlflow.tracking.client:MlflowClient#_no_such_attribute")


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("from mlflow.utils.rest_utils import x", "mlflow.utils.rest_utils:x"),
        ("from mlflow.tracking import fluent", "mlflow.tracking.fluent"),
        ("from azureml.mlflow.entry import x", "azureml.mlflow.entry:x"),
        ("import_module('mlflow.tracking.fluent')", "mlflow.tracking.fluent"),
        ("store._unheard_of()", "_unheard_of"),
        ("getattr(store, '_unheard_of', None)", "_unheard_of"),
        ("client._tracking_client", "_tracking_client"),
    ],
)
def test_what_is_not_listed_is_found(line: str, name: str) -> None:
    """The look at this package can fail, also for a name that it has itself."""
    assert list(used_in(ast.parse(line), {"_tracking_client", "_ours"})) == [name]
    assert not is_listed(name, "errors.py")


@pytest.mark.parametrize(
    "line",
    [
        "from mlflow.entities import Run",
        "from mlflow.tracking import MlflowClient",
        "self._unheard_of()",
        "logger._ours()",
        "os._exit(0)",
        "tags['mlflow.runName']",
    ],
)
def test_what_is_documented_or_ours_may_be_used(line: str) -> None:
    """The list is of MLflow's insides alone."""
    assert list(used_in(ast.parse(line), {"_ours"})) == []
