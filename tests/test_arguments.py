"""What a caller may hand over, and the words for what he may not."""

from __future__ import annotations

import mlflow
import pytest

from flowbuffer import InvalidPoint, MetricLogger, SettingError, Settings
from support.backends import client, history, make_run

# Who logs, to what.


def test_settings_as_keywords(sqlite_uri: str) -> None:
    """A logger takes settings by name, over those that it is given as a whole, over those of the
    environment."""
    run_id = make_run(sqlite_uri)
    for settings in (None, Settings(linger_s=3, ranks="0")):
        with MetricLogger(run_id, tracking_uri=sqlite_uri, settings=settings, linger_s=0) as logger:
            assert logger.settings.linger_s == 0
            assert logger.settings.delivery == "thread"  # of the environment
            assert logger.settings.ranks == ("all" if settings is None else "0")
    with pytest.raises(SettingError, match=r"lingers is not a setting.*did you mean linger_s"):
        MetricLogger(run_id, tracking_uri=sqlite_uri, lingers=0)
    with pytest.raises(SettingError, match=r"settings is \{'linger_s': 1\}, a dict; it must be"):
        MetricLogger(run_id, tracking_uri=sqlite_uri, settings={"linger_s": 1})  # type: ignore[arg-type]


@pytest.mark.parametrize("named", [True, False], ids=["tracking_uri=", "MLflow's"])
def test_a_run_that_is_started_has_a_name_and_a_place(sqlite_uri: str, named: bool) -> None:
    """`experiment` and `run_name` are those of the run that is started; an experiment that is not
    there is created."""
    if not named:
        mlflow.set_tracking_uri(sqlite_uri)
    uri = sqlite_uri if named else None
    for _ in range(2):
        with MetricLogger(tracking_uri=uri, experiment="trees", run_name="oak") as logger:
            logger.log_metric("leaves", 3)
        run = client(sqlite_uri).get_run(logger.run_id)
        experiment = client(sqlite_uri).get_experiment(run.info.experiment_id)
        assert (experiment.name, run.info.run_name) == ("trees", "oak")
        assert run.info.status == "FINISHED"


def test_a_run_is_taken_for_its_id(sqlite_uri: str) -> None:
    """MLflow's run, active or not, stands for its id; what is no run is told at once."""
    mlflow.set_tracking_uri(sqlite_uri)
    with mlflow.start_run() as run, MetricLogger(run) as logger:
        logger.log_metric("k", 1.0)
    assert logger.run_id == run.info.run_id
    with MetricLogger(client(sqlite_uri).get_run(run.info.run_id)) as logger:
        logger.log_metric("k", 2.0)
    assert [one.value for one in history(sqlite_uri, run.info.run_id, "k")] == [1.0, 2.0]
    for wrong in (5, "", {}, ["a"], run.info):
        with pytest.raises(InvalidPoint, match="it must be a run's id"):
            MetricLogger(wrong)  # type: ignore[arg-type]
