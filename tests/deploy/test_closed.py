"""What the shipped files leave open: addresses that a pod reaches, pods that reach Ray, images that may be replaced."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.deploy.builder import ROOT
from tests.deploy.test_ray_up import CLOUDS, read

POLICIES = ROOT / "cluster" / "kuberay" / "base" / "network-policy.yaml"
OWN = {"app.kubernetes.io/part-of": "acestep-ray"}
CLOSED = [
    "10.0.0.1",  # RFC 1918
    "10.255.255.255",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.0.1",
    "100.64.0.1",  # carriers' NAT; Alibaba's metadata is 100.100.100.200
    "100.100.100.200",
    "127.0.0.1",
    "169.254.169.254",  # metadata of AWS, Google, Azure
    "169.254.170.2",  # ECS
    "168.63.129.16",  # Azure's wire server
    "192.0.0.192",  # Oracle
    "198.18.0.1",
    "0.0.0.0",
    "224.0.0.1",
    "255.255.255.255",
    "fd00:ec2::254",  # AWS's metadata over IPv6
    "::1",
    "fe80::1",
    "fc00::1",
    "64:ff9b::a9fe:a9fe",  # 169.254.169.254 through NAT64
    "::ffff:169.254.169.254",
]


def policies() -> dict[str, dict[str, Any]]:
    documents = yaml.safe_load_all(POLICIES.read_text(encoding="utf-8"))
    return {each["metadata"]["name"]: each["spec"] for each in documents}


def blocks(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for rule in spec["egress"]:
        assert rule["to"], "a rule without peers lets everything out"
        assert rule.get("ports") or "ipBlock" not in str(rule), "all ports are open"
        yield from (peer["ipBlock"] for peer in rule["to"] if "ipBlock" in peer)


def lets_out(block: dict[str, Any], address: str) -> bool:
    def holds(network: str) -> bool:
        return ipaddress.ip_address(address) in ipaddress.ip_network(network)

    return holds(block["cidr"]) and not any(map(holds, block.get("except", [])))


@pytest.mark.parametrize("address", CLOSED)
def test_no_pod_reaches_a_private_address_or_a_metadata_service(address):
    for name, spec in policies().items():
        assert not [block for block in blocks(spec) if lets_out(block, address)], name


@pytest.mark.parametrize("address", ["52.216.1.1", "142.250.1.1", "18.160.1.1"])
def test_storage_and_downloads_on_the_internet_are_reached_by_https_alone(address):
    (rule,) = [rule for rule in policies()["acestep-ray"]["egress"] if "ipBlock" in rule["to"][0]]
    assert lets_out(rule["to"][0]["ipBlock"], address)
    assert rule["ports"] == [{"port": 443, "protocol": "TCP"}]


def test_exceptions_lie_within_their_block():
    """Kubernetes refuses the policy otherwise."""
    for spec in policies().values():
        for block in blocks(spec):
            whole = ipaddress.ip_network(block["cidr"])
            assert all(ipaddress.ip_network(part).subnet_of(whole) for part in block.get("except", []))


def test_every_peer_in_another_namespace_is_named_by_namespace_and_by_label():
    for spec in policies().values():
        peers = [peer for rule in spec.get("ingress", []) for peer in rule["from"]]
        peers += [peer for rule in spec.get("egress", []) for peer in rule["to"]]
        for peer in peers:
            assert peer, "an empty peer is everybody"
            if "ipBlock" in peer:
                continue
            assert peer["podSelector"]["matchLabels"]
            if peer["podSelector"]["matchLabels"] != OWN:
                assert peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]


def test_the_dashboard_answers_the_operator_in_its_own_namespace_alone():
    us, operator = policies()["acestep-ray"]["ingress"]
    assert us == {"from": [{"podSelector": {"matchLabels": OWN}}]}
    assert operator["from"] == [
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kuberay-system"}},
            "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
        }
    ]
    assert operator["ports"] == [{"port": 8265, "protocol": "TCP"}]
    guide = (ROOT / "cluster" / "README.md").read_text(encoding="utf-8")
    assert "--namespace kuberay-system" in guide


def test_only_the_head_may_be_let_to_the_kubernetes_api_and_its_address_is_the_user_s():
    spec = policies()["acestep-ray-kubernetes-api"]
    assert spec["podSelector"]["matchLabels"] == {**OWN, "ray.io/node-type": "head"}
    assert spec["policyTypes"] == ["Egress"]
    (block,) = blocks(spec)
    assert block == {"cidr": "192.0.2.1/32"}  # RFC 5737: for documentation
    guide = (ROOT / "cluster" / "README.md").read_text(encoding="utf-8")
    (patch,) = re.findall(r"value: (\S+/32)\}", guide)
    assert ipaddress.ip_network(patch).num_addresses == 1


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_cloud_s_machines_name_one_image_and_no_newest_one(cloud):
    config = read(cloud)
    text = str(config["available_node_types"])
    images = re.findall(r"(?:ImageId|sourceImage)': '([^']*)'", text)
    assert len(images) >= len(config["available_node_types"])
    for image in images:
        assert not re.search(r"latest|/family/|resolve:|:$", image), image
        assert re.fullmatch(
            r"(projects/[\w-]+/global/images/)?(MY_(GPU_)?IMAGE|[\w-]*v?20\d{6}[\w-]*)", image
        )


def test_every_image_that_is_downloaded_has_its_digest():
    bases = re.findall(
        r"^ARG \w*IMAGE=(\S+)", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert bases
    for image in bases:
        assert re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", image)
    for path in (ROOT / "cluster" / "kuberay").rglob("*.yaml"):
        for image in re.findall(r"^\s*-?\s*image: (\S+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            # Ours, whose version kustomization.yaml names.
            assert re.fullmatch(r"acestep-ray(-cpu|-cuda)?", image), (path, image)
