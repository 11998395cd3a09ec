"""MLflow and TensorBoard behind one small class; neither ends a run when it fails.

MLflow's metrics are sent by a thread of their own. While the server takes none they wait in `mlflow-buffer.jsonl` in
the run's log folder, a line each, and whoever tracks the run next sends them first. What is sent twice, because an
answer was lost, is one metric to MLflow: it has the same time.
"""

from acestep_ray.tracking.environment import environment_tags
from acestep_ray.tracking.local_database import mlflow_command, same_run
from acestep_ray.tracking.mlflow_address import mlflow_uri
from acestep_ray.tracking.mlflow_run import (
    MLflowRun,
    check_mlflow,
    end_mlflow_run,
    located_run,
    start_mlflow_run,
)
from acestep_ray.tracking.tracker import BUFFER_FILE, Tracker

__all__ = [
    "BUFFER_FILE",
    "MLflowRun",
    "Tracker",
    "check_mlflow",
    "end_mlflow_run",
    "environment_tags",
    "located_run",
    "mlflow_command",
    "mlflow_uri",
    "same_run",
    "start_mlflow_run",
]
