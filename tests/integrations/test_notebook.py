"""A notebook in a real kernel: its stop button and its restart lose nothing (P4, P7).

`scripts/notebook` installs what runs one; elsewhere these tests are skipped.
"""

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from support.backends import MlflowServer, history, make_run
from support.faults import FaultProxy, forward, status
from support.waiting import PATIENCE_S, wait_until

nbformat = pytest.importorskip("nbformat", reason="scripts/notebook has it")
nbclient = pytest.importorskip("nbclient", reason="scripts/notebook has it")
pytest.importorskip("ipykernel", reason="scripts/notebook has it")

#: The client leaves the sockets of a kernel that was restarted to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


class Notebook:
    """Cells, run in one kernel after another."""

    def __init__(self) -> None:
        self._book = nbformat.v4.new_notebook()
        self.client = nbclient.NotebookClient(
            self._book, timeout=PATIENCE_S, kernel_name="python3", allow_errors=True
        )

    def run(self, code: str) -> Any:
        """Run a cell; its outputs."""
        self._book.cells.append(nbformat.v4.new_code_cell(code))
        index = len(self._book.cells) - 1
        return self.client.execute_cell(self._book.cells[index], index)["outputs"]

    def stop(self) -> None:
        """Press the stop button."""
        nbclient.util.run_sync(self.client.km.interrupt_kernel)()


@pytest.fixture
def notebook() -> Iterator[Notebook]:
    book = Notebook()
    with book.client.setup_kernel(env={**os.environ, "IPYTHONDIR": os.getcwd()}):
        yield book


def text_of(outputs: Any) -> str:
    return "".join(one.get("text", "") for one in outputs)


def errors_of(outputs: Any) -> list[str]:
    return [one["ename"] for one in outputs if one["output_type"] == "error"]


def test_stop_and_restart(notebook: Notebook, server_sqlite: MlflowServer) -> None:
    """The stop button ends a wait at once; the next cell logs and waits as if nothing had been;
    and what was not delivered when the kernel was restarted is delivered by the next one."""
    run_id = make_run(server_sqlite.uri)
    with FaultProxy(server_sqlite.uri) as proxy:
        begin = f"""
        import flowbuffer
        logger = flowbuffer.MetricLogger({run_id!r}, tracking_uri={proxy.uri!r})
        """.replace("\n        ", "\n")
        proxy.always(status(503))
        assert errors_of(notebook.run(begin + "logger.log_metric('loss', 1.0)")) == []

        def stop_in_the_wait() -> None:
            # The wait is in its second second: it says so.
            wait_until(lambda: len(proxy.requests) >= 3)
            notebook.stop()

        presser = threading.Thread(target=stop_in_the_wait)
        presser.start()
        stopped = notebook.run("logger.flush()")
        presser.join()
        assert errors_of(stopped) == ["KeyboardInterrupt"]
        proxy.always(forward)
        again = notebook.run("logger.log_metric('loss', 2.0)\nprint(logger.flush().pending)")
        assert errors_of(again) == []
        assert text_of(again).splitlines()[-1] == "0"

        proxy.always(status(503))
        assert errors_of(notebook.run("logger.log_metric('loss', 3.0)")) == []
        nbclient.util.run_sync(notebook.client.km.restart_kernel)(now=True)
        nbclient.util.run_sync(notebook.client.kc.wait_for_ready)(timeout=PATIENCE_S)
        proxy.always(forward)
        after = notebook.run(
            begin + "logger.log_metric('loss', 4.0)\nprint(logger.close().pending)"
        )
        assert errors_of(after) == []
        wait_until(lambda: len(history(server_sqlite.uri, run_id, "loss")) == 4)
    values = [metric.value for metric in history(server_sqlite.uri, run_id, "loss")]
    assert values == [1.0, 2.0, 3.0, 4.0]


def test_a_long_wait_is_shown(notebook: Notebook, server_sqlite: MlflowServer) -> None:
    """A cell that waits has one line that says how it goes."""
    run_id = make_run(server_sqlite.uri)
    with FaultProxy(server_sqlite.uri) as proxy:
        proxy.always(status(503))
        outputs = notebook.run(
            "import flowbuffer\n"
            f"logger = flowbuffer.MetricLogger({run_id!r}, tracking_uri={proxy.uri!r})\n"
            "logger.log_metric('loss', 1.0)\nprint(logger.flush(timeout=3).pending)"
        )
        assert errors_of(outputs) == []
        assert "\rflowbuffer: " in text_of(outputs)
        assert "0/1" in text_of(outputs)
        proxy.always(forward)
        assert text_of(notebook.run("print(logger.close().pending)")).splitlines()[-1] == "0"
