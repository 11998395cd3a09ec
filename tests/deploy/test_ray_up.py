"""aws.yaml and gcp.yaml: Ray's own validator, and what both must keep to."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.deploy.builder import ROOT

CLOUDS = ("aws", "gcp")


def read(cloud: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster" / f"{cloud}.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_takes_the_file_and_adds_no_commands_of_its_own(cloud):
    config = read(cloud)
    prepared = prepare_config(config)
    validate_config(prepared)
    for where in ("head", "worker"):
        # Ray's defaults begin the dashboard for everybody, and install what they like.
        assert prepared[f"{where}_setup_commands"] == config["setup_commands"]
        assert prepared[f"{where}_start_ray_commands"] == config[f"{where}_start_ray_commands"]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_s_validator_refuses_a_mistake(cloud):
    prepared = prepare_config(read(cloud))
    prepared["idle_timeout"] = 5
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config(prepared)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_head_without_cpus_has_pools_of_cpus_and_gpus_that_begin_at_zero(cloud):
    config = read(cloud)
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
    assert set(types) == {"head", "cpu", "gpu"}
    for name in ("cpu", "gpu"):
        assert types[name]["min_workers"] == 0 < types[name]["max_workers"]
        assert types[name]["resources"][f"{name}_node"] == 1
        assert ("GPU" in types[name]["resources"]) == (name == "gpu")
    assert types["cpu"]["max_workers"] + types["gpu"]["max_workers"] <= config["max_workers"]
    assert 0 < config["idle_timeout_minutes"] <= 30


@pytest.mark.parametrize("cloud", CLOUDS)
def test_nodes_ask_for_the_token_of_the_launching_machine_and_the_dashboard_stays_at_home(cloud):
    config = read(cloud)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    (environment,) = [each for each in config["setup_commands"] if "~/acestep/environment;" in each]
    assert "RAY_AUTH_MODE=token" in environment
    assert "RAY_JOB_START_TIMEOUT_SECONDS=3600" in environment
    for where in ("head", "worker"):
        (start,) = [each for each in config[f"{where}_start_ray_commands"] if "ray start" in each]
        assert start.startswith("source ~/acestep/environment;")
    head = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    assert "0.0.0.0" not in str(config)
    assert "RAY_AUTH_TOKEN" not in str(config)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_no_secret_and_no_name_of_somebody_else_is_in_the_file(cloud):
    text = (ROOT / "cluster" / f"{cloud}.yaml").read_text(encoding="utf-8")
    assert not re.search(
        r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|\b\d{12}\b|(?:sg|subnet|ami)-[0-9a-f]{8,}", text
    )


def test_machines_on_aws_have_encrypted_disks_and_a_security_group_of_the_user():
    for node_type in read("aws")["available_node_types"].values():
        machine = node_type["node_config"]
        # Ray's own group would let SSH in from everywhere.
        assert machine["SecurityGroupIds"]
        assert machine["SubnetIds"]
        assert all(disk["Ebs"]["Encrypted"] for disk in machine["BlockDeviceMappings"])
        assert machine["MetadataOptions"]["HttpTokens"] == "required"


def test_machines_on_aws_have_the_form_that_ec2_takes():
    botocore = pytest.importorskip("botocore.session")
    from botocore.validate import ParamValidator

    model = botocore.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for node_type in read("aws")["available_node_types"].values():
        machine = {**node_type["node_config"], "MinCount": 1, "MaxCount": 1}
        machine["SubnetId"] = machine.pop("SubnetIds")[0]  # Ray tries one after another
        report = ParamValidator().validate(machine, model)
        assert not report.has_errors(), report.generate_report()
        assert machine.keys() <= model.members.keys()


def test_decoders_may_be_machines_that_are_taken_away():
    aws, gcp = (read(cloud)["available_node_types"]["cpu"]["node_config"] for cloud in CLOUDS)
    assert aws["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert gcp["scheduling"] == {"preemptible": True}
