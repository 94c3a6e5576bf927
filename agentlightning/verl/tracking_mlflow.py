"""MLflow: a run's lines and samples go in, a run on a tracking server or in a file of the run directory comes out.

It is asked at each start which step it has, so that the curve has each step once. All goes through `MlflowClient`, which
has no state of the process as the functions of `mlflow` do.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from agentlightning.checkpoint.preemption import EXIT_CODE
from agentlightning.errors import ConfigError
from agentlightning.verl.metrics import STEP
from agentlightning.verl.tracking_samples import COLUMNS, GenerationSample
from agentlightning.verl.tracking_secrets import without_secrets
from agentlightning.verl.tracking_service import TABLE, LoggerError, Metrics, RunInfo, keep_id, kept_id, numbers

if TYPE_CHECKING:
    from mlflow import MlflowClient

MLFLOW_ID_FILE = "mlflow_run_id.txt"
_STORE, _ARTIFACTS = "mlflow.db", "mlflow_artifacts"
_ENVIRONMENT = {  # what the user has set stays
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # its own 7 hold each step up for minutes; we try again at a later step
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # it would write into the console's live display
}
_METRICS_A_CALL, _PARAMS_A_CALL, _LONGEST_NAME, _LONGEST_VALUE = 1000, 100, 250, 500  # MLflow's limits
_ENDINGS = {0: "FINISHED", EXIT_CODE: "KILLED"}


class MlflowLogger:
    """MLflow, at MLFLOW_TRACKING_URI or in `<run>/mlflow.db`. A step that is done again is not logged twice."""

    url = None

    def __init__(self, run: RunInfo, run_id: str | None) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        local = f"sqlite:///{(run.run_dir / _STORE).resolve()}"
        uri = os.environ.get("MLFLOW_TRACKING_URI", local)
        artifacts = (run.run_dir / _ARTIFACTS).resolve().as_uri() if uri == local else None
        try:
            self._client = MlflowClient(tracking_uri=uri)
            self.run_id, self.last_step = _open_run(self._client, run, run_id, artifacts)
        except (MlflowException, OSError) as error:
            raise ConfigError(
                f"trainer.logger: given mlflow, which does not start at {without_secrets(uri)}: "
                f"{without_secrets(str(error))}; set MLFLOW_TRACKING_URI in the environment to a server that answers, or mend "
                "it with trainer.logger=[console]"
            ) from error

    def resume(self, held: int) -> None:
        """Nothing to do: it was asked what it has."""

    def log(self, step: int, metrics: Metrics) -> None:
        """One batch a step; the step's own number comes last, so that a step which was cut short is logged again."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = {**{name: value for name, value in numbers(metrics).items() if name != STEP}, STEP: step}
        rows = [Metric(mlflow_name(name), value, now, step) for name, value in values.items()]
        with _mlflow_errors():
            for start in range(0, len(rows), _METRICS_A_CALL):
                self._client.log_batch(self.run_id, metrics=rows[start : start + _METRICS_A_CALL])
        self.last_step = step

    def table(self, step: int, rows: Sequence[GenerationSample]) -> None:
        """An artifact a step, in the layout of MLflow's own tables."""
        content = {"columns": list(COLUMNS), "data": [row.cells for row in rows]}
        try:
            self._client.log_dict(self.run_id, content, f"{TABLE}/step_{step}.json")
        except Exception as error:  # each artifact store has a client of its own, with errors of its own
            raise LoggerError(str(error)) from error

    def finish(self, exit_code: int) -> None:
        """FINISHED, or FAILED; a run that was asked to leave is KILLED until it goes on."""
        with _mlflow_errors():
            self._client.set_terminated(self.run_id, _ENDINGS.get(exit_code, "FAILED"))


def mlflow_name(name: str) -> str:
    """A metric's name as MLflow allows it: `@` as `_at_` (as verl has it), other characters as `_`."""
    allowed = re.sub(r"[^\w./ :-]", "_", name.replace("@", "_at_"), flags=re.ASCII)
    return "/".join(part for part in allowed.split("/") if part not in ("", ".", ".."))[:_LONGEST_NAME] or "_"


@contextlib.contextmanager
def _mlflow_errors() -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise LoggerError(str(error)) from error


def _open_run(client: MlflowClient, run: RunInfo, run_id: str | None, artifacts: str | None) -> tuple[str, int]:
    """The run to go on with, or a new one where the store does not know it: its id, and the newest step it has."""
    path = run.run_dir / MLFLOW_ID_FILE
    found = next((run for run in (_find_run(client, id) for id in (run_id, kept_id(path)) if id) if run), None)
    if found is None:
        found = client.create_run(_experiment(client, run.project, artifacts), run_name=run.name)
        keep_id(path, found.info.run_id)
    else:
        client.update_run(found.info.run_id, status="RUNNING")
    if not found.data.params:
        _log_params(client, found.info.run_id, run.config)
    return found.info.run_id, int(found.data.metrics.get(STEP, -1))


def _find_run(client: MlflowClient, run_id: str) -> Any | None:
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return found if found.info.lifecycle_stage == "active" else None


def _experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    try:
        return client.create_experiment(name, artifact_location=artifacts)
    except MlflowException:
        found = client.get_experiment_by_name(name)  # another run of the project may have begun in this very moment
        if found is None:
            raise
        return found.experiment_id


def _log_params(client: MlflowClient, run_id: str, config: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    params = [Param(mlflow_name(name), str(value)[:_LONGEST_VALUE]) for name, value in _leaves(config)]
    for start in range(0, len(params), _PARAMS_A_CALL):
        client.log_batch(run_id, params=params[start : start + _PARAMS_A_CALL])


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of the tree with its dotted key."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
