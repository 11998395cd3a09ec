"""The objects for Kubernetes: KubeRay's schema, Kubernetes' own, and what all of them must keep to."""

from __future__ import annotations

import copy
import json
import lzma
import os
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import acestep_ray
from acestep_ray.cli import build_parser, with_export_action, with_switches_on
from tests.deploy.builder import ROOT

KUBERAY = ROOT / "cluster" / "kuberay"
SCHEMAS = json.loads(lzma.decompress((Path(__file__).parent / "data/kuberay-1.7.0.json.xz").read_bytes()))
OVERLAYS = sorted(path.parent.name for path in KUBERAY.glob("overlays/*/kustomization.yaml"))
JOBS = sorted(path.parent.name for path in KUBERAY.glob("jobs/*/kustomization.yaml"))
FOLDERS = ["base", *(f"overlays/{name}" for name in OVERLAYS), *(f"jobs/{name}" for name in JOBS)]
RAY_JOBS = [name for name in JOBS if name != "fetch"]

UNITS = {"": 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}

# Of checkov's rules, those that are decided otherwise.
NOT_CHECKED = {
    "CKV_K8S_15": "a tag is never written again, and nodes without a way to the registry may hold the image already",
    "CKV_K8S_43": "the image is built by who deploys it: its digest is not known here",
    "CKV_K8S_35": "MLflow and the storage clients read credentials from variables",
    "CKV_K8S_8": "KubeRay adds the liveness probe of the Ray container",
    "CKV_K8S_9": "KubeRay adds the readiness probe of the Ray container",
    "CKV_K8S_38": "the head's autoscaler asks the Kubernetes API for pods",
    "CKV2_K8S_6": "the policy is of the cluster, and looks at labels that KubeRay adds too",
}


@pytest.fixture(params=FOLDERS)
def objects(request, kustomize) -> list[dict[str, Any]]:
    """What `kubectl apply -k` of one folder sends."""
    return kustomize(KUBERAY / request.param)


def of_kind(objects: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [each for each in objects if each["kind"] == kind]


def clusters(objects: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The specification of every Ray cluster, a job's own too."""
    for each in objects:
        if each["kind"] == "RayCluster":
            yield each["spec"]
        elif each["kind"] == "RayJob":
            yield each["spec"]["rayClusterSpec"]


def groups(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def pods(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Pods as KubeRay and Kubernetes make them of the objects, by a name; the head with its autoscaler."""
    templates: dict[str, dict[str, Any]] = {}
    for cluster in clusters(objects):
        head = copy.deepcopy(cluster["headGroupSpec"]["template"])
        given = {
            key: cluster["autoscalerOptions"][key] for key in ("resources", "securityContext", "volumeMounts")
        }
        image = head["spec"]["containers"][0]["image"]
        autoscaler = {"name": "autoscaler", "image": image, "imagePullPolicy": "IfNotPresent", **given}
        head["spec"]["containers"].append(autoscaler)
        templates["head"] = head
        templates |= {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    for job in of_kind(objects, "RayJob"):
        templates["submitter"] = job["spec"]["submitterPodTemplate"]
    for job in of_kind(objects, "Job"):
        templates["job"] = job["spec"]["template"]
    return {
        name: {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": "acestep", **template["metadata"]},
            "spec": template["spec"],
        }
        for name, template in templates.items()
    }


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def quantity(text: str | int) -> float:
    """`16Gi` → bytes."""
    number, unit = re.fullmatch(r"([\d.]+)(\w*)", str(text)).groups()
    return float(number) * UNITS[unit]


def without_unknown_fields(schema: Any) -> Any:
    """The schema, refusing what it does not name, as the API server with strict field validation."""
    if isinstance(schema, list):
        return [without_unknown_fields(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: without_unknown_fields(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        open_ended = "additionalProperties" in schema or "x-kubernetes-preserve-unknown-fields" in schema
        is_root = {"apiVersion", "kind", "metadata"} <= schema["properties"].keys()
        if not open_ended and not is_root:
            strict["additionalProperties"] = False
    return strict


@cache
def validator(kind: str) -> jsonschema.Draft202012Validator:
    """KubeRay's schema, strictly; the `metadata` of a pod template is open in it."""
    return jsonschema.Draft202012Validator(without_unknown_fields(SCHEMAS[kind]))


def check_schema(document: dict[str, Any]) -> None:
    validator(document["kind"]).validate(document)


def test_ray_objects_have_the_form_that_kuberay_published(objects):
    for each in objects:
        if each["kind"] in SCHEMAS:
            check_schema(each)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "enableInTreeAutoScaling"), True),
        (("spec", "authOptions", "mode"), "password"),
        (("spec", "workerGroupSpecs", 0, "minReplicas"), "none"),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "ressources"), {}),
    ],
)
def test_the_schema_refuses_a_mistake(path, value):
    cluster = yaml.safe_load((KUBERAY / "base/ray-cluster.yaml").read_text(encoding="utf-8"))
    check_schema(cluster)
    *parents, last = path
    place = cluster
    for key in parents:
        place = place[key]
    place[last] = value
    with pytest.raises(jsonschema.ValidationError):
        check_schema(cluster)


def test_pods_meet_kubernetes_restricted_profile(objects):
    for name, pod in pods(objects).items():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"], name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert all({"emptyDir", "persistentVolumeClaim"} & volume.keys() for volume in spec["volumes"])
        for container in containers(pod):
            security = container["securityContext"]
            assert security["runAsNonRoot"], container["name"]
            assert security["runAsUser"] >= 10_000
            assert security["readOnlyRootFilesystem"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert security["seccompProfile"] == {"type": "RuntimeDefault"}
            assert "hostPort" not in str(container.get("ports"))


def test_containers_run_as_the_user_that_the_image_has(objects):
    user = re.search(r"^USER (\d+):", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)[1]
    for pod in pods(objects).values():
        assert {container["securityContext"]["runAsUser"] for container in containers(pod)} == {int(user)}


def test_the_namespace_enforces_that_profile(objects):
    (namespace,) = of_kind(objects, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {each["metadata"].get("namespace", "acestep") for each in objects} == {
        namespace["metadata"]["name"]
    }


def test_containers_have_requests_and_limits_that_agree(objects):
    for pod in pods(objects).values():
        for container in containers(pod):
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            assert {"cpu", "memory"} <= requests.keys() == limits.keys(), container["name"]
            assert all(quantity(requests[name]) <= quantity(limits[name]) for name in limits)


def test_volumes_on_disk_and_in_memory_fit_the_limits(objects):
    for pod in pods(objects).values():
        sizes = {
            volume["name"]: (volume["emptyDir"].get("medium"), quantity(volume["emptyDir"]["sizeLimit"]))
            for volume in pod["spec"]["volumes"]
            if "emptyDir" in volume
        }
        limits = pod["spec"]["containers"][0]["resources"]["limits"]
        assert sum(size for medium, size in sizes.values() if medium is None) <= quantity(
            limits["ephemeral-storage"]
        )
        assert sum(size for medium, size in sizes.values() if medium) <= quantity(limits["memory"]) / 2


def test_rays_object_store_fits_shared_memory(objects):
    for cluster in clusters(objects):
        for group in groups(cluster):
            spec = group["template"]["spec"]
            mounts = {mount["mountPath"]: mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
            volumes = {volume["name"]: volume for volume in spec["volumes"]}
            assert {"/dev/shm", "/tmp", "/home/ray"} <= mounts.keys()
            shared = volumes[mounts["/dev/shm"]]["emptyDir"]
            assert shared["medium"] == "Memory"
            assert int(group["rayStartParams"]["object-store-memory"]) <= quantity(shared["sizeLimit"])


def test_ray_is_told_the_cpus_and_gpus_that_a_pod_has(objects):
    for cluster in clusters(objects):
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        for group in cluster["workerGroupSpecs"]:
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            assert group["resources"]["CPU"] == limits["cpu"]
            assert group["resources"].get("GPU") == limits.get("nvidia.com/gpu")
            assert group["resources"][f"{group['groupName']}_node"] == "1"


def test_pools_grow_from_zero_and_shrink_again(kustomize):
    for name in OVERLAYS:
        (cluster,) = clusters(kustomize(KUBERAY / "overlays" / name))
        assert cluster["enableInTreeAutoscaling"]
        assert 0 < cluster["autoscalerOptions"]["idleTimeoutSeconds"] <= 3600
        for group in cluster["workerGroupSpecs"]:
            assert group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"]


def test_gpu_pods_alone_go_to_gpu_nodes(objects):
    for name, pod in pods(objects).items():
        wants = any("nvidia.com/gpu" in container["resources"]["limits"] for container in containers(pod))
        tolerates = any(each["key"] == "nvidia.com/gpu" for each in pod["spec"].get("tolerations", []))
        assert wants == tolerates == (name == "gpu")
        assert all(("cuda" in container["image"]) == wants for container in containers(pod))


def test_ray_asks_for_a_token_that_kuberay_makes(objects):
    for cluster in clusters(objects):
        assert cluster["authOptions"] == {"mode": "token"}


def test_nothing_is_exposed_beyond_the_cluster(objects):
    for cluster in clusters(objects):
        assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
        assert "headService" not in cluster["headGroupSpec"]
        assert "enableIngress" not in cluster["headGroupSpec"]
    assert not {"Ingress", "Gateway", "HTTPRoute", "Service"} & {each["kind"] for each in objects}


def test_the_network_policy_holds_every_pod_and_names_who_may_come_in(objects):
    policies = {each["metadata"]["name"]: each["spec"] for each in of_kind(objects, "NetworkPolicy")}
    assert set(policies) == {"acestep-ray", "acestep-ray-kubernetes-api"}
    spec = policies["acestep-ray"]
    assert set(spec["policyTypes"]) == {"Ingress", "Egress"}
    own = spec["podSelector"]["matchLabels"]
    for pod in pods(objects).values():
        assert own.items() <= pod["metadata"]["labels"].items()
    us, operator = spec["ingress"]
    assert us == {"from": [{"podSelector": {"matchLabels": own}}]}
    assert [port["port"] for port in operator["ports"]] == [8265]
    assert operator["from"][0].keys() == {"namespaceSelector", "podSelector"}


def test_secrets_are_named_and_never_written(objects):
    assert not of_kind(objects, "Secret")
    for pod in pods(objects).values():
        for container in containers(pod):
            for variable in container.get("env", []):
                assert not re.search("TOKEN|SECRET|PASSWORD|KEY", variable["name"]) or "valueFrom" in variable
    for settings in of_kind(objects, "ConfigMap"):
        assert not re.search("TOKEN|SECRET|PASSWORD|ACCESS_KEY", " ".join(settings["data"]))


def test_only_the_head_has_an_account_of_the_kubernetes_api(objects):
    accounts = {each["metadata"]["name"] for each in of_kind(objects, "ServiceAccount")}
    for name, pod in pods(objects).items():
        assert (pod["spec"].get("automountServiceAccountToken") is False) == (name != "head")
        assert pod["spec"].get("serviceAccountName") in (accounts if name != "head" else {None})


def test_images_are_this_version_s(objects):
    for pod in pods(objects).values():
        for container in containers(pod):
            assert re.fullmatch(
                rf"acestep-ray:{re.escape(acestep_ray.__version__)}-(cpu|cuda)", container["image"]
            )


def test_names_of_another_registry_reach_every_container(tmp_path, kustomize):
    (tmp_path / "kustomization.yaml").write_text(
        yaml.safe_dump(
            {
                "resources": [os.path.relpath(KUBERAY / "overlays/bucket", tmp_path)],
                "images": [{"name": "acestep-ray", "newName": "registry.example/acestep-ray"}],
            }
        ),
        encoding="utf-8",
    )
    objects = kustomize(tmp_path)
    images = [container["image"] for pod in pods(objects).values() for container in containers(pod)]
    assert len(images) == 7
    assert all(image.startswith("registry.example/acestep-ray:") for image in images)


@pytest.mark.parametrize("name", ["gpu-1x8", "large", "small"])
def test_artefacts_lie_on_a_volume_that_every_node_mounts(kustomize, name):
    objects = kustomize(KUBERAY / "overlays" / name)
    (claim,) = of_kind(objects, "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce" if name == "small" else "ReadWriteMany"]
    for pod in pods(objects).values():
        claims = [
            each["persistentVolumeClaim"]["claimName"]
            for each in pod["spec"]["volumes"]
            if len(each) == 2 and "persistentVolumeClaim" in each
        ]
        assert claims == [claim["metadata"]["name"]]


def test_artefacts_lie_in_a_bucket_and_the_checkpoint_is_fetched_by_every_pod(kustomize):
    objects = kustomize(KUBERAY / "overlays/bucket")
    assert not of_kind(objects, "PersistentVolumeClaim")
    (settings,) = of_kind(objects, "ConfigMap")
    assert settings["data"]["ARTEFACTS"].startswith("s3://")
    for pod in pods(objects).values():
        (fetch,) = pod["spec"]["initContainers"]
        assert fetch["command"][-1] == settings["data"]["CHECKPOINT_DIR"]
        build_parser().parse_args(fetch["command"][1:])
        assert {"secretRef": {"name": "acestep-bucket", "optional": True}} in pod["spec"]["containers"][0][
            "envFrom"
        ]
        assert "persistentVolumeClaim" not in str(pod)


def ray_job(kustomize, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A RayJob, and the settings that its command names."""
    objects = kustomize(KUBERAY / "jobs" / name)
    (job,), (settings,) = of_kind(objects, "RayJob"), of_kind(objects, "ConfigMap")
    return job["spec"], settings["data"]


def arguments_of(command: str, settings: dict[str, str]) -> list[str]:
    """The arguments of a job's command, as its shell hands them over."""
    words = shlex.split(re.sub(r"\$(\w+)", lambda match: settings[match[1]], command))
    assert words[0] == "acestep-ray"
    return with_switches_on(with_export_action(words[1:]))


@pytest.mark.parametrize("name", RAY_JOBS)
def test_a_job_s_command_is_one_that_acestep_ray_takes(kustomize, name):
    spec, settings = ray_job(kustomize, name)
    arguments = arguments_of(spec["entrypoint"], settings)
    assert arguments[0] == name.split("-")[0]
    parsed = build_parser().parse_args(arguments)[arguments[0]]
    assert parsed.checkpoint_dir == settings["CHECKPOINT_DIR"]


@pytest.mark.parametrize("name", RAY_JOBS)
def test_a_job_brings_its_cluster_and_takes_it_away(kustomize, name):
    spec, _ = ray_job(kustomize, name)
    objects = kustomize(KUBERAY / "jobs" / name)
    assert not of_kind(objects, "RayCluster")
    assert spec["submissionMode"] == "K8sJobMode"
    assert spec["shutdownAfterJobFinishes"]
    assert 0 < spec["ttlSecondsAfterFinished"] <= 3600 <= spec["activeDeadlineSeconds"]
    assert 0 < spec["preRunningDeadlineSeconds"] <= spec["activeDeadlineSeconds"]
    # What goes on where it stopped is tried again; what would begin anew is not.
    assert (spec["backoffLimit"] > 0) == (name.split("-")[0] in ("precompute", "train", "tune"))


@pytest.mark.parametrize("name", RAY_JOBS)
def test_a_job_asks_for_a_gpu_node_which_its_cluster_can_start(kustomize, name):
    spec, _ = ray_job(kustomize, name)
    asked = {"GPU": spec.get("entrypointNumGpus", 0), **json.loads(spec.get("entrypointResources", "{}"))}
    asked = {resource: amount for resource, amount in asked.items() if amount}
    assert asked
    assert any(
        group["maxReplicas"] and all(float(group["resources"].get(key, 0)) >= asked[key] for key in asked)
        for group in spec["rayClusterSpec"]["workerGroupSpecs"]
    )


@pytest.mark.parametrize("name", RAY_JOBS)
def test_ray_lets_a_driver_wait_for_its_node_as_long_as_kuberay_does(kustomize, name):
    spec, _ = ray_job(kustomize, name)
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    variables = {variable["name"]: variable["value"] for variable in head["env"]}
    assert int(variables["RAY_JOB_START_TIMEOUT_SECONDS"]) == spec["preRunningDeadlineSeconds"]


@pytest.mark.parametrize("name", ["train", "train-4x8"])
def test_training_asks_for_as_many_gpus_as_are_there_when_it_begins(kustomize, name):
    spec, settings = ray_job(kustomize, name)
    parsed = build_parser().parse_args(arguments_of(spec["entrypoint"], settings)).train
    (gpu,) = [group for group in spec["rayClusterSpec"]["workerGroupSpecs"] if group["groupName"] == "gpu"]
    # The first node comes with the driver, which waits for it; of more, all are there before the job is submitted.
    nodes = max(1, gpu["minReplicas"])
    assert parsed.devices * parsed.num_nodes == nodes * int(gpu["resources"]["GPU"])
    assert nodes <= gpu["maxReplicas"]


def test_training_s_lora_configuration_is_in_the_image(kustomize):
    spec, settings = ray_job(kustomize, "train")
    path = build_parser().parse_args(arguments_of(spec["entrypoint"], settings)).train.lora_config_path
    copied = re.search(
        r"^COPY (.*) (\S+)$",
        (ROOT / "Dockerfile").read_text(encoding="utf-8").split("/pipelines\n")[1],
        re.MULTILINE,
    )
    assert path == f"{copied[2]}lora_config.json"
    assert "lora_config.json" in copied[1].split()


@pytest.mark.deploy
def test_objects_have_kubernetes_own_form(kustomize, linter, tmp_path):
    files = []
    for folder in FOLDERS:
        objects = kustomize(KUBERAY / folder)
        known = [each for each in objects if each["kind"] not in SCHEMAS]
        for number, each in enumerate([*known, *pods(objects).values()]):
            files.append(tmp_path / f"{folder.replace('/', '-')}-{number}-{each['kind']}.yaml")
            files[-1].write_text(yaml.safe_dump(each), encoding="utf-8")
    done = linter("kubernetes-validate", "--strict", "-k", "1.32.0", *files)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.deploy
def test_checkov_finds_nothing(kustomize, linter, tmp_path):
    for folder in FOLDERS:
        objects = kustomize(KUBERAY / folder)
        known = [each for each in objects if each["kind"] not in SCHEMAS]
        path = tmp_path / f"{folder.replace('/', '-')}.yaml"
        path.write_text(yaml.safe_dump_all([*known, *pods(objects).values()]), encoding="utf-8")
    done = linter(
        "checkov", "--framework", "kubernetes", "--skip-download", "--compact", "--quiet", "--output", "json",
        "--skip-check", ",".join(NOT_CHECKED), "--directory", tmp_path,
    )  # fmt: skip
    summary = json.loads(done.stdout)
    failed = {check["check_id"] + " " + check["check_name"] for check in summary["results"]["failed_checks"]}
    assert not failed
    assert summary["summary"]["passed"] > 1000


@pytest.mark.deploy
def test_yamllint_finds_nothing(linter):
    done = linter("yamllint", "--strict", "cluster")
    assert done.returncode == 0, done.stdout
