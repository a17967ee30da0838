"""FLOWBUFFER_ENABLED=1 and a script that knows nothing of flowbuffer, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest

from flowbuffer import SettingError
from flowbuffer.commands import cli
from flowbuffer.spool.folders import Spool
from support.backends import MlflowServer, client, copy_sqlite, make_run
from support.jobs import Ended
from support.stored import models, rows, stored
from support.waiting import PATIENCE_S, wait_until

#: What MLflow's documentation shows, and no word of flowbuffer.
SCRIPT = """
import mlflow
from mlflow import MlflowClient, log_metric, log_params
from mlflow.entities import Metric, Param, RunTag

with mlflow.start_run(run_name="first") as run:
    log_params({"lr": 0.1, "layers": [1, 2]})
    mlflow.log_param("optimizer", "adam")
    mlflow.set_tags({"stage": "training", "n": 1})
    for step in range(200):
        log_metric("loss", 1 / (step + 1), step=step)
        mlflow.log_metrics({"acc": step / 200, "bad": float("nan")}, step=step)
    for value in range(50):
        log_metric("falling", -value)  # one step, a few milliseconds
    client = MlflowClient()
    client.log_batch(
        run.info.run_id,
        [Metric("batch", float(n), 1_700_000_000_000 + n, n) for n in range(20)],
        [Param("p", "1")],
        [RunTag("t", "1")],
    )
    mlflow.log_metric("waited", 1.0, synchronous=False).wait()
    mlflow.log_metric("stored", 1.0, synchronous=True)
    assert client.get_run(run.info.run_id).data.metrics["falling"] == -49
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 200
    mlflow.set_tag("stage", "tested")
    try:
        mlflow.log_param("optimizer", "sgd")
    except mlflow.MlflowException as error:
        mlflow.set_tag("refused", error.error_code)
    with mlflow.start_run(run_name="second", nested=True):
        log_metric("loss", 0.5)
        mlflow.set_tag("child", "yes")
    model = mlflow.create_external_model("net")
    mlflow.log_metric("of the model", 0.75, model_id=model.model_id)

try:
    with mlflow.start_run(run_name="third"):
        mlflow.log_metric("loss", 0.25)
        raise RuntimeError
except RuntimeError:
    pass

mlflow.start_run(run_name="fourth")
mlflow.log_metric("loss", 0.125)
mlflow.log_param("end", "none")
"""


class Scripts:
    """Runs Python scripts; none outlives the test.

    Args:
        folder: Where they are, and run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, code: str, uri: str, **environment: str) -> subprocess.Popen[str]:
        """Start one; its own name is in its tracebacks."""
        self._count += 1
        script = self._folder / f"script{self._count}.py"
        script.write_text(textwrap.dedent(code))
        process = subprocess.Popen(
            [sys.executable, str(script)],
            env={**os.environ, "MLFLOW_TRACKING_URI": uri, **environment},
            cwd=self._folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def run(self, code: str, uri: str, **environment: str) -> Ended:
        """Start one and wait for its end."""
        return ended(self.start(code, uri, **environment))

    def kill(self) -> None:
        """End what still runs."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            if process.stdout and not process.stdout.closed:
                process.communicate()


def ended(process: subprocess.Popen[str]) -> Ended:
    out, err = process.communicate(timeout=PATIENCE_S)
    return Ended(process.returncode, out, err, 0.0)


@pytest.fixture
def scripts(tmp_path: Path) -> Iterator[Scripts]:
    made = Scripts(tmp_path)
    yield made
    made.kill()


@pytest.fixture(scope="module")
def template_scripts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripts]:
    made = Scripts(tmp_path_factory.mktemp("stock"))
    yield made
    made.kill()


def of_script(uri: str) -> dict[str, Any]:
    """What the runs of SCRIPT have, by their names, and the model."""
    found: dict[str, Any] = {}
    for run in client(uri).search_runs(["0"]):
        if run.info.run_name in ("first", "second", "third", "fourth"):
            held = stored(uri, run.info.run_id)
            held["tags"].pop("mlflow.parentRunId", None)
            found[run.info.run_name] = held
    return found


@pytest.fixture(scope="module")
def stock(template_scripts: Scripts, sqlite_template: Path) -> dict[str, Any]:
    """What MLflow alone stores."""
    uri = copy_sqlite(sqlite_template, template_scripts._folder / "mlflow.db")
    over = template_scripts.run(SCRIPT, uri, FLOWBUFFER_SPOOL_DIR="/nowhere")
    assert over.status == 0, over.err
    found = of_script(uri)
    assert [found[name]["status"] for name in sorted(found)] == ["FINISHED"] * 3 + ["FAILED"]
    assert models(uri) == {"net": [("of the model", "0.75", 0, "", "")]}
    return found


def wait_until_empty(spool: Path) -> None:
    """Of a folder that is delivered the name is gone at once, and the rest soon."""
    wait_until(lambda: not any(spool.glob("*/*")))


def test_an_unchanged_script_on_sqlite(
    scripts: Scripts, sqlite_uri: str, stock: dict[str, Any], tmp_path: Path
) -> None:
    """With the variable set a script stores in a SQLite file what it stores with MLflow alone, down
    to the model, the order of equal steps, and the status of each run."""
    over = scripts.run(SCRIPT, sqlite_uri, FLOWBUFFER_ENABLED="1")
    assert over.status == 0, over.err
    assert of_script(sqlite_uri) == {
        **stock,
        "first": {**stock["first"], "histories": histories_in_order(stock)},
    }
    assert models(sqlite_uri) == {"net": [("of the model", "0.75", 0, "", "")]}
    wait_until_empty(tmp_path / "spool")


def histories_in_order(stock: dict[str, Any]) -> dict[str, Any]:
    """MLflow alone sorts points of one millisecond and one step by their values; in the order of
    the calls they come back only with flowbuffer."""
    falling = [(repr(float(-value)), 0) for value in range(50)]
    assert sorted(stock["first"]["histories"]["falling"]) == sorted(falling)
    return {**stock["first"]["histories"], "falling": falling}


def test_an_unchanged_script_on_a_server(
    scripts: Scripts, server_sqlite: MlflowServer, stock: dict[str, Any]
) -> None:
    """So it is on a tracking server."""
    uri = server_sqlite.uri
    before = {run.info.run_id for run in client(uri).search_runs(["0"])}
    over = scripts.run(SCRIPT, uri, FLOWBUFFER_ENABLED="true")
    assert over.status == 0, over.err
    found = {
        run.info.run_name: stored(uri, run.info.run_id)
        for run in client(uri).search_runs(["0"])
        if run.info.run_id not in before
    }
    found["second"]["tags"].pop("mlflow.parentRunId")
    assert found.keys() == stock.keys()
    assert found["first"]["histories"] == histories_in_order(stock)
    for name in ("second", "third", "fourth"):
        assert found[name] == stock[name]
    for part in ("params", "tags", "status", "models", "latest"):
        assert found["first"][part] == stock["first"][part]


#: A plugin, as Azure ML's is: a package that registers a scheme.
STUB = """
import os

def store(store_uri, artifact_uri=None):
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    assert store_uri == "azureml://westeurope.api.azureml.ms/mlflow/v1.0/workspace"
    return SqlAlchemyStore(os.environ["STUB_DATABASE"], "./artifacts")
"""
AZURE = "azureml://westeurope.api.azureml.ms/mlflow/v1.0/workspace"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH with an installed plugin for azureml:// in it; it hides the real one,
    if that is installed, by its name."""
    site = tmp_path / "site"
    information = site / "azureml_mlflow-99.0.dist-info"
    information.mkdir(parents=True)
    (site / "stub_azureml.py").write_text(STUB)
    (information / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: azureml-mlflow\nVersion: 99.0\n"
    )
    (information / "entry_points.txt").write_text(
        "[mlflow.tracking_store]\nazureml = stub_azureml:store\n"
    )
    return site


@pytest.mark.parametrize("delivery", ["thread", "process"])
def test_an_unchanged_script_with_a_plugins_scheme(
    scripts: Scripts,
    sqlite_uri: str,
    stock: dict[str, Any],
    site: Path,
    tmp_path: Path,
    delivery: str,
) -> None:
    """So it is with a scheme that a plugin resolves, whoever delivers, and the tracking URI is not
    changed."""
    code = f"{SCRIPT}\nassert mlflow.get_tracking_uri() == {AZURE!r}\n"
    over = scripts.run(
        code,
        AZURE,
        FLOWBUFFER_ENABLED="1",
        FLOWBUFFER_DELIVERY=delivery,
        STUB_DATABASE=sqlite_uri,
        PYTHONPATH=str(site),
    )
    assert over.status == 0, over.err
    found = of_script(sqlite_uri)
    assert found["first"]["histories"] == histories_in_order(stock)
    for name in ("second", "third", "fourth"):
        assert found[name] == stock[name]
    for part in ("params", "tags", "status", "models", "latest"):
        assert found["first"][part] == stock["first"][part]
    wait_until_empty(tmp_path / "spool")


# Where the variable is not set.

UNTOUCHED = """
import __future__, atexit, importlib.metadata, json, sys, typing
before = set(sys.modules)
import flowbuffer.dropin.plugin
alone = sorted(set(sys.modules) - before)

import mlflow
from mlflow import MlflowClient
from mlflow.tracking import fluent
from mlflow.tracking._tracking_service.utils import _tracking_store_registry
names = ("log_metric", "log_metrics", "log_param", "log_params", "set_tag", "set_tags", "log_batch")
found = [getattr(owner, name, None) for owner in (mlflow, fluent, MlflowClient) for name in names]
print(json.dumps({
    "alone": alone,
    "imported": sorted(name for name in sys.modules if name.split(".")[0] == "flowbuffer"),
    "replaced": [str(one) for one in found if one and "flowbuffer" in one.__code__.co_filename],
    "finders": [str(one) for one in sys.meta_path if "flowbuffer" in str(one)],
    "loaded": "flowbuffer" in _tracking_store_registry._registry,
}))
"""


def test_not_set_changes_nothing(scripts: Scripts, sqlite_uri: str) -> None:
    """Where the variable is not set, or is 0, `import mlflow` loads flowbuffer's plugin and imports
    nothing else of it, and nothing for it, and leaves MLflow's functions as they are."""
    started = [
        scripts.start(UNTOUCHED, sqlite_uri, **setting)
        for setting in ({}, {"FLOWBUFFER_ENABLED": "0"}, {"FLOWBUFFER_ENABLED": ""})
    ]
    for process in started:
        over = ended(process)
        assert over.status == 0, over.err
        assert json.loads(over.out.splitlines()[-1]) == {
            "alone": ["flowbuffer", "flowbuffer.dropin", "flowbuffer.dropin.plugin"],
            "imported": ["flowbuffer", "flowbuffer.dropin", "flowbuffer.dropin.plugin"],
            "replaced": [],
            "finders": [],
            "loaded": True,
        }


def test_a_misspelt_switch_is_told(scripts: Scripts, sqlite_uri: str) -> None:
    """Where MLflow is imported, a variable that was meant to be the switch is told with the right
    name, and so is a value that is neither yes nor no; settings that are right are no reason for a
    word."""
    words = {
        "FLOWBUFFER_ENABLE": (
            "1",
            "FLOWBUFFER_ENABLE is ignored: did you mean FLOWBUFFER_ENABLED?",
        ),
        "FLOWBUFFER_ENABLED": ("jein", "allowed are 1, true, yes, on, 0, false, no, off"),
        "FLOWBUFFER_OFFLINE": ("on", None),
        "FLOWBUFFER_SERVER": ("jein", "allowed are 1, true, yes, on, 0, false, no, off"),
    }
    started = {
        variable: scripts.start("import mlflow", sqlite_uri, **{variable: text})
        for variable, (text, _) in words.items()
    }
    for variable, process in started.items():
        over, (_, said) = ended(process), words[variable]
        assert over.status == 0, over.err
        assert said is None or said in over.err
        assert ("FLOWBUFFER" in over.err) is (said is not None)


FIRST_IMPORTS = {
    "functions": "from mlflow import log_metric",
    "a part of MLflow": "from mlflow.tracking.fluent import log_metric",
    "flowbuffer": "import flowbuffer, mlflow.tracking.client\nfrom mlflow import log_metric",
    "enabled twice": "import flowbuffer\nflowbuffer.enable()\nfrom mlflow import log_metric",
}


def test_set_wherever_mlflow_is_first_imported(scripts: Scripts, sqlite_uri: str) -> None:
    """With the variable set, MLflow's functions are replaced before anybody can take them, whatever
    part of MLflow a program imports first, and no hook is left behind; the program can switch it
    off again."""
    check = """
import sys
import flowbuffer, mlflow
from mlflow import MlflowClient
assert "flowbuffer" in log_metric.__code__.co_filename
assert "flowbuffer" in mlflow.set_tags.__code__.co_filename
assert "flowbuffer" in MlflowClient.log_batch.__code__.co_filename
assert not [one for one in sys.meta_path if "flowbuffer" in str(one)]
log_metric("k", 1.0)
flowbuffer.disable()
assert "flowbuffer" not in mlflow.log_metric.__code__.co_filename
mlflow.log_metric("k", 2.0)
"""
    started = {
        name: scripts.start(f"{first}\n{check}", sqlite_uri, FLOWBUFFER_ENABLED="yes")
        for name, first in FIRST_IMPORTS.items()
    }
    for name, process in started.items():
        over = ended(process)
        assert over.status == 0, (name, over.err)
    assert rows(sqlite_uri) == (2 * len(FIRST_IMPORTS), 0, 0)


def test_flowbuffer_is_no_scheme() -> None:
    """`flowbuffer:` as a tracking URI is an error that says what to do."""
    mlflow.set_tracking_uri("flowbuffer://server")
    with pytest.raises(SettingError, match="FLOWBUFFER_ENABLED=1"):
        mlflow.search_experiments()
    with pytest.raises(SettingError, match="flowbuffer://server"):
        mlflow.MlflowClient().get_run("0" * 32)


def test_a_bad_setting_is_a_clear_error(scripts: Scripts, sqlite_uri: str) -> None:
    """A setting that cannot be is an error that names it and what is allowed, before the program
    logs anything."""
    for setting, text in (("FLOWBUFFER_LINGER_S", "soon"), ("FLOWBUFFER_DELIVERY", "pigeon")):
        variables = {setting: text, "FLOWBUFFER_ENABLED": "1"}
        over = scripts.run("import mlflow\nprint('imported')", sqlite_uri, **variables)
        assert over.status != 0
        assert over.out == ""
        last = over.err.strip().splitlines()[-1]
        for word in ("SettingError", setting, text):
            assert word in last


# The end of the script.

LOG = """
import os, signal, sys
import mlflow

mlflow.start_run(run_id=os.environ["RUN"])
for step in range(1, 501):
    mlflow.log_metric("loss", -float(step))
    mlflow.set_tag("step", step)
mlflow.log_param("p", 1)
"""

#: What ends a script, its exit status, and the status of its run with MLflow alone.
ENDS = {
    "no end_run": ("", 0, "FINISHED"),
    "sys.exit": ("sys.exit(3)", 3, "FINISHED"),
    "exception": ("raise ValueError('of the script')", 1, "FINISHED"),
    "a thread's exception": (
        "import threading\nt = threading.Thread(target=lambda: 1 / 0); t.start(); t.join()",
        0,
        "FINISHED",
    ),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, "RUNNING"),
}


def test_every_end_delivers(scripts: Scripts, sqlite_template: Path, tmp_path: Path) -> None:
    """P7: without end_run, with sys.exit, an exception or SIGTERM every row is stored, the script's
    exit status is its own, and the run's status is that of MLflow alone."""
    started = []
    for name, (code, status, run_status) in ENDS.items():
        uri = copy_sqlite(sqlite_template, tmp_path / f"{name}.db")
        run_id = make_run(uri)
        settings = {"FLOWBUFFER_ENABLED": "1", "RUN": run_id}
        if name == "exception":
            settings["FLOWBUFFER_DELIVERY"] = "process"
        process = scripts.start(LOG + code, uri, **settings)
        started.append((name, process, uri, run_id, status, run_status))
    for name, process, uri, run_id, status, run_status in started:
        over = ended(process)
        assert over.status == status, (name, over.err)
        found = stored(uri, run_id)
        assert found["histories"] == {"loss": [(repr(-float(n)), 0) for n in range(1, 501)]}
        assert (found["params"], found["tags"]) == ({"p": "1"}, {"step": "500"})
        assert found["status"] == run_status, name
    wait_until_empty(tmp_path / "spool")


def test_sigkill_loses_nothing(scripts: Scripts, sqlite_uri: str, tmp_path: Path) -> None:
    """P1: what a script that is killed had logged is in the spool, and `flowbuffer sync` delivers
    it."""
    run_id = make_run(sqlite_uri)
    over = scripts.run(
        f"{LOG}\nos.kill(os.getpid(), signal.SIGKILL)",
        sqlite_uri,
        RUN=run_id,
        FLOWBUFFER_ENABLED="1",
        FLOWBUFFER_LINGER_S="3600",
    )
    assert over.status == -signal.SIGKILL
    assert rows(sqlite_uri)[0] < 500
    spool = tmp_path / "spool"
    assert list(Spool(spool).folders(run_id))
    assert cli.main(["sync", "--spool", str(spool), "--timeout", "150"]) == 0
    found = stored(sqlite_uri, run_id)
    assert found["histories"] == {"loss": [(repr(-float(step)), 0) for step in range(1, 501)]}
    assert (found["params"], found["tags"]) == ({"p": "1"}, {"step": "500"})
    wait_until_empty(spool)
