"""What a user is told of Ray."""

from __future__ import annotations

import io
import logging

import pytest
from ray.exceptions import RayTaskError, WorkerCrashedError

from acestep_ray.errors import AceStepError, InputError
from acestep_ray.ray_runtime import faults_explained


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (RayTaskError("_Encode", "", InputError("a broken part")), InputError, "^a broken part$"),
        (
            RayTaskError(
                "_Encode", "", RuntimeError("CUDA error at song 'a'\nFailed to apply UDF after 1 attempt")
            ),
            AceStepError,
            r"^precompute stopped: CUDA error at song 'a'\n.*the same command goes on",
        ),
        (WorkerCrashedError(), AceStepError, "^precompute stopped: The worker died"),
    ],
)
def test_a_fault_in_a_worker_surfaces_as_one_message_with_its_cause(error, raised, message):
    with pytest.raises(raised, match=message), faults_explained("precompute", "encoded"):
        raise error


def test_the_console_keeps_ray_datas_warnings_and_nothing_else():
    logger = logging.getLogger("ray.data")
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    try:
        with faults_explained("precompute", "encoded"):
            logger.info("executing")
            logger.warning("Progress bars disabled. To enable, …")
            logging.getLogger("ray.data._internal.issue_detection.manager").warning("give more memory")
            logger.warning("no room in the cluster")
            logger.error("an exception was raised")
        logger.error("later")
    finally:
        logger.removeHandler(handler)
    assert stream.getvalue().splitlines() == ["no room in the cluster", "later"]
