"""Forked and spawned children of a process whose calls are buffered."""

from __future__ import annotations

import pytest

from support.jobs import StartJob, Store


@pytest.mark.parametrize("end", ["os._exit(0)", "sys.exit()"])
def test_a_forked_child(start_job: StartJob, store: Store, end: str) -> None:
    """What a forked child logs to its parent's run arrives once, beside what the parent had not
    delivered yet, and the parent's reads and end wait for it."""
    job = start_job(
        f"""
        flowbuffer.enable(linger_s=3600)
        client = mlflow.MlflowClient()
        mlflow.start_run(run_id=RUN)
        # In a forked child no run is active, so the run is named.
        def log(key, values):
            for value in values:
                mlflow.log_metric(key, -float(value), run_id=RUN)
                client.set_tag(RUN, key, value)
        log("parent", range(50))
        pid = os.fork()
        if pid == 0:
            log("child", range(50))
            client.log_param(RUN, "child", 1)
            {end}
        log("parent", range(50, 100))
        assert os.waitpid(pid, 0)[1] == 0
        found = [m.value for m in client.get_metric_history(RUN, "child")]
        assert found == [-float(value) for value in range(50)], found
        assert client.get_run(RUN).data.params == {{"child": "1"}}
        mlflow.end_run()
        """
    )
    ended = job.end()
    assert ended.status == 0, ended.err
    assert store.values("parent") == [-float(value) for value in range(100)]
    assert store.values("child") == [-float(value) for value in range(50)]
    tags = dict(
        store.connection.execute("SELECT key, value FROM tags WHERE key NOT LIKE 'mlflow%'")
    )
    assert tags == {"parent": "99", "child": "49"}
    assert store.statuses() == ["FINISHED"]


def test_a_spawned_child(start_job: StartJob, store: Store) -> None:
    """A spawned child of a process with FLOWBUFFER_ENABLED=1 is buffered of itself, and its rows
    are there when the parent ends the run."""
    job = start_job(
        """
        import multiprocessing

        def work(number):
            assert hasattr(mlflow.log_metric, "flowbuffers")
            for step in range(50):
                mlflow.log_metric(f"child{number}", -float(step), run_id=RUN)

        if __name__ == "__main__":
            mlflow.start_run(run_id=RUN)
            mlflow.log_metric("parent", 1.0)
            context = multiprocessing.get_context("spawn")
            children = [context.Process(target=work, args=(n,)) for n in range(2)]
            for child in children:
                child.start()
            for child in children:
                child.join()
                assert child.exitcode == 0
            mlflow.end_run()
        """,
        FLOWBUFFER_ENABLED="1",
    )
    ended = job.end()
    assert ended.status == 0, ended.err
    for number in range(2):
        assert store.values(f"child{number}") == [-float(step) for step in range(50)]
    assert store.values("parent") == [1.0]
