"""The manifests as kustomize renders them: valid by Kubernetes' own schemas, and what the server needs stands in them.

Kinds that are not Kubernetes' own (ServiceMonitor, RayService, InferenceService) have no schema here: they are linted,
and held to what they share with the base and with the code. None of them was run.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.settings import Settings
from tests.kubernetes.kubectl import render
from tests.service import read_settings

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = ROOT / "deploy" / "kubernetes"
FOLDERS = ("base", "gpu", "monitoring", "rayservice", "kserve")
CORE = {"Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy"}
CUSTOM = {"monitoring": "ServiceMonitor", "rayservice": "RayService", "kserve": "InferenceService"}


@pytest.fixture(scope="module")
def rendered() -> dict[str, str]:
    """Of each folder."""
    return {folder: render(MANIFESTS / folder) for folder in FOLDERS}


@pytest.fixture(scope="module")
def kinds(rendered: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Of each folder: kind -> document."""
    return {
        folder: {document["kind"]: document for document in yaml.safe_load_all(text)}
        for folder, text in rendered.items()
    }


def run(tool: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """One of the tools beside this Python."""
    return subprocess.run([Path(sys.executable).parent / tool, *arguments], capture_output=True, text=True, timeout=60)


def pods(kinds: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every pod's spec, by where it stands."""
    cluster = kinds["rayservice"]["RayService"]["spec"]["rayClusterConfig"]
    return {
        "base": kinds["base"]["Deployment"]["spec"]["template"]["spec"],
        "gpu": kinds["gpu"]["Deployment"]["spec"]["template"]["spec"],
        "ray head": cluster["headGroupSpec"]["template"]["spec"],
        "ray worker": cluster["workerGroupSpecs"][0]["template"]["spec"],
        "kserve": kinds["kserve"]["InferenceService"]["spec"]["predictor"],
    }


def environment(pod: dict[str, Any]) -> dict[str, Any]:
    return {variable["name"]: variable["value"] for variable in pod["containers"][0]["env"]}


def test_every_folder_renders_the_kinds_it_is_for(kinds: dict[str, dict[str, Any]]) -> None:
    assert set(kinds["base"]) == set(kinds["gpu"]) == CORE
    assert set(kinds["monitoring"]) == {*CORE, "ServiceMonitor"}
    assert set(kinds["rayservice"]) == {"RayService"}
    assert set(kinds["kserve"]) == {"InferenceService", "HorizontalPodAutoscaler"}


@pytest.mark.parametrize("folder", ["base", "gpu", "monitoring", "kserve"])
def test_core_kinds_are_valid_by_kubernetes_schemas(
    folder: str, kinds: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    core = [document for kind, document in kinds[folder].items() if kind in CORE]
    file = tmp_path / "rendered.yaml"
    file.write_text(yaml.safe_dump_all(core), encoding="utf-8")
    found = run("kubernetes-validate", "--strict", file)
    assert found.returncode == 0, found.stdout + found.stderr
    assert (found.stdout + found.stderr).count("passed for resource") == len(core) > 0


def test_the_validation_sees_a_field_that_is_none(rendered: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "rendered.yaml"
    file.write_text(rendered["base"].replace("maxUnavailable: 1", "maxUnavailabel: 1"), encoding="utf-8")
    assert run("kubernetes-validate", "--strict", file).returncode != 0


def test_files_and_what_they_render_are_clean_yaml(rendered: dict[str, str]) -> None:
    rules = "{extends: default, rules: {line-length: {max: 120}, document-start: disable, octal-values: disable}}"
    found = run("yamllint", "--strict", "-d", rules, MANIFESTS)
    assert found.returncode == 0, found.stdout
    for folder, kind in CUSTOM.items():
        document = next(d for d in yaml.safe_load_all(rendered[folder]) if d["kind"] == kind)
        assert set(document) == {"apiVersion", "kind", "metadata", "spec"}
        assert document["metadata"]["name"] == "precis"


def test_every_pod_runs_as_nobody_on_a_file_system_it_cannot_write(kinds: dict[str, dict[str, Any]]) -> None:
    for place, pod in pods(kinds).items():
        security = pod["securityContext"]
        assert (security["runAsNonRoot"], security["runAsUser"]) == (True, 10001), place
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, place
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, place
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert "sizeLimit" in volumes[mounts["/tmp"]["name"]]["emptyDir"], place
        writable = {path for path, mount in mounts.items() if not mount.get("readOnly")}
        assert writable <= {"/tmp", "/dev/shm"}, place


def test_every_pod_says_what_it_takes_and_no_more(kinds: dict[str, dict[str, Any]]) -> None:
    for place, pod in pods(kinds).items():
        resources = pod["containers"][0]["resources"]
        assert {"cpu", "memory"} <= set(resources["requests"]) & set(resources["limits"]), place
        assert resources["requests"]["memory"] == resources["limits"]["memory"], place


def test_a_gpu_pod_asks_for_one(kinds: dict[str, dict[str, Any]]) -> None:
    pod = pods(kinds)["gpu"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert environment(pod)["PRECIS_DEVICE"] == "cuda"


def test_every_variable_is_a_setting_with_a_value_that_it_takes(kinds: dict[str, dict[str, Any]]) -> None:
    for place, pod in pods(kinds).items():
        given = {k.removeprefix("PRECIS_").lower(): v for k, v in environment(pod).items() if k.startswith("PRECIS_")}
        assert set(given) <= set(Settings.model_fields), place
        read_settings(**given)


@pytest.mark.parametrize("place", ["base", "gpu", "kserve"])
def test_the_end_of_a_pod_leaves_time_for_its_drain(place: str, kinds: dict[str, dict[str, Any]]) -> None:
    pod = pods(kinds)[place]
    variables = environment(pod)
    drain = float(variables["PRECIS_DRAIN_DELAY"]) + float(variables["PRECIS_DRAIN_TIMEOUT"])
    assert pod["terminationGracePeriodSeconds"] > drain
    probe = pod["containers"][0]["livenessProbe"]
    patience = probe["periodSeconds"] * probe["failureThreshold"]
    assert patience > drain + Settings.model_fields["max_heartbeat_age"].default
    startup = pod["containers"][0]["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 300


def test_selectors_find_the_pods_and_nothing_else(kinds: dict[str, dict[str, Any]]) -> None:
    base, own = kinds["base"], {"app.kubernetes.io/name": "precis"}
    assert own.items() <= base["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    for selector in (
        base["Deployment"]["spec"]["selector"]["matchLabels"],
        base["Service"]["spec"]["selector"],
        base["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        base["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        kinds["monitoring"]["ServiceMonitor"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector == own
    assert own.items() <= base["Service"]["metadata"]["labels"].items()


def test_the_network_policy_lets_in_who_is_labelled_and_nothing_out(kinds: dict[str, dict[str, Any]]) -> None:
    spec = kinds["base"]["NetworkPolicy"]["spec"]
    assert set(spec["policyTypes"]) == {"Ingress", "Egress"}
    assert not spec.get("egress")
    (rule,) = spec["ingress"]
    assert [port["port"] for port in rule["ports"]] == ["http"]
    allowed = [peer["podSelector"]["matchLabels"] for peer in rule["from"]]
    assert allowed == [{"precis-client": "true"}, {"precis-client": "true"}, {"app.kubernetes.io/name": "prometheus"}]


def test_ports_are_named_the_same_everywhere(kinds: dict[str, dict[str, Any]]) -> None:
    base = kinds["base"]
    (port,) = base["Deployment"]["spec"]["template"]["spec"]["containers"][0]["ports"]
    assert str(port["containerPort"]) == environment(pods(kinds)["base"])["PRECIS_PORT"]
    assert base["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    (endpoint,) = kinds["monitoring"]["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["port"] == base["Service"]["spec"]["ports"][0]["name"]
    kserve = pods(kinds)["kserve"]
    assert str(kserve["containers"][0]["ports"][0]["containerPort"]) == environment(kserve)["PRECIS_PORT"]


def test_the_autoscaler_wants_less_than_a_pods_slots(kinds: dict[str, dict[str, Any]]) -> None:
    scaler = kinds["base"]["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == kinds["base"]["Deployment"]["metadata"]["name"]
    (metric,) = scaler["metrics"]
    rules = yaml.safe_load((MANIFESTS / "monitoring" / "adapter-values.yaml").read_text(encoding="utf-8"))
    (rule,) = rules["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert float(metric["pods"]["target"]["averageValue"]) <= Settings.model_fields["max_num_seqs"].default
    assert "replicas" not in kinds["base"]["Deployment"]["spec"]
    assert kinds["kserve"]["HorizontalPodAutoscaler"]["spec"]["metrics"] == scaler["metrics"]


def test_the_adapters_rule_reads_metrics_that_there_are() -> None:
    rules = (MANIFESTS / "monitoring" / "adapter-values.yaml").read_text(encoding="utf-8")
    metrics = (ROOT / "app" / "metrics.py").read_text(encoding="utf-8")
    for name in ("precis_running", "precis_queue_depth"):
        assert f"{name}{{" in rules
        assert f'"{name}"' in metrics


def test_ray_is_told_what_the_application_takes(kinds: dict[str, dict[str, Any]]) -> None:
    spec = kinds["rayservice"]["RayService"]["spec"]
    config = yaml.safe_load(spec["serveConfigV2"])
    (application,) = config["applications"]
    module, _, function = application["import_path"].partition(":")
    source = (ROOT / Path(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8")
    assert f"def {function}(" in source
    for name in application["args"]:
        assert f"    {name}: Annotated[" in source
    assert set(application["args"]["settings"]) <= set(Settings.model_fields)
    worker = spec["rayClusterConfig"]["workerGroupSpecs"][0]
    assert worker["maxReplicas"] >= application["args"]["max_replicas"]
    cpu = worker["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]
    assert float(cpu) == application["args"]["num_cpus"]
    variables = environment(worker["template"]["spec"])
    module, _, function = variables["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].partition(":")
    assert f"def {function}(" in (ROOT / Path(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8")
    pinned = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    minor = ".".join(spec["rayClusterConfig"]["rayVersion"].split(".")[:2])
    assert f'"ray[serve]=={minor}.*"' in pinned
