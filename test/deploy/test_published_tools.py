"""The files of deploy/ before Helm, Kubernetes' own schemas and hadolint.

`make test-deploy` runs this in an environment of these tools, without SGLang.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "sglang-dllm"
OF_CLUSTERS = ("1.29.0", "1.34.0")
"""Versions of Kubernetes whose schemas the manifests must fit."""
CUSTOM = ("ServiceMonitor",)

ALL_ON: dict[str, Any] = {
    "nameOverride": "other",
    "image": {"pullSecrets": ["registry"]},
    "model": {
        "path": "/mnt/models/llada",
        "servedName": "llada",
        "algorithmConfig": "threshold: 0.5\nalgorithms:\n  LLaDA: {steps: 32}\n",
    },
    "storage": {"enabled": True, "className": "fast"},
    "download": {
        "enabled": True,
        "source": "GSAI-ML/LLaDA-8B-Instruct",
        "tokenSecret": "hub",
    },
    "extraArgs": ["--context-length=4096"],
    "extraEnv": [{"name": "A", "value": "b"}],
    "apiKeySecret": "keys",
    "nodeSelector": {"gpu": "h200"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "metrics": {"serviceMonitor": {"enabled": True, "labels": {"team": "a"}}},
    "autoscaling": {"enabled": True},
    "podDisruptionBudget": {"enabled": True, "minAvailable": "50%"},
}
CASES = {
    "defaults": {},
    "everything": ALL_ON,
    "a claim that exists": {"storage": {"enabled": True, "existingClaim": "models"}},
    "no metrics": {"metrics": {"enabled": False}},
}


def render(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The manifests of a release named demo, by their kind."""
    with helm_python.Chart.load(str(CHART)) as chart:
        chart.validate_schema(values)
        texts = chart.render(values, name="demo", namespace="default")
    found = [
        document
        for name, text in texts.items()
        if name.endswith(".yaml")
        for document in yaml.safe_load_all(text)
        if document
    ]
    return {document["kind"]: document for document in found}


def server_of(values: dict[str, Any]) -> dict[str, Any]:
    pod = render(values)["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return dict(container)


@pytest.mark.parametrize("name", ["cpu.Dockerfile", "gpu.Dockerfile"])
def test_hadolint_has_nothing_to_say(name: str) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run(
        [hadolint, "--no-color", DEPLOY / name], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("case", CASES)
def test_helm_lints_the_chart(case: str) -> None:
    report = helm_python.lint(str(CHART), CASES[case], strict=True)
    worse = [one for one in report["messages"] if one["severity"] > 1]
    assert (report["errors"], worse) == ([], [])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("version", OF_CLUSTERS)
def test_kubernetes_knows_each_field(case: str, version: str) -> None:
    kinds = render(CASES[case])
    assert {"Deployment", "Service"} <= kinds.keys()
    for kind, manifest in kinds.items():
        if kind not in CUSTOM:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_everything_is_there() -> None:
    assert render(ALL_ON).keys() == {
        *("Deployment", "Service", "ConfigMap", "PersistentVolumeClaim"),
        *("HorizontalPodAutoscaler", "PodDisruptionBudget", "ServiceMonitor"),
    }
    assert render({}).keys() == {"Deployment", "Service"}


def test_the_algorithm_s_file_arrives_as_it_is() -> None:
    text = render(ALL_ON)["ConfigMap"]["data"]["algorithm.yaml"]
    assert yaml.safe_load(text) == yaml.safe_load(ALL_ON["model"]["algorithmConfig"])
    args = server_of(ALL_ON)["args"]
    assert "--dllm-algorithm-config=/etc/sglang-dllm/algorithm.yaml" in args


def test_the_key_comes_from_a_secret_and_stands_in_no_manifest() -> None:
    server = server_of(ALL_ON)
    assert "--api-key=$(SGLANG_DLLM_API_KEY)" in server["args"]
    (key, other) = server["env"]
    assert key["valueFrom"]["secretKeyRef"] == {"name": "keys", "key": "api-key"}
    assert other == {"name": "A", "value": "b"}


def test_the_names_of_ports_volumes_and_labels_meet() -> None:
    kinds = render(ALL_ON)
    template = kinds["Deployment"]["spec"]["template"]
    pod = template["spec"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in (*pod["containers"], *pod["initContainers"]):
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    (port,) = pod["containers"][0]["ports"]
    assert f"--port={port['containerPort']}" in pod["containers"][0]["args"]
    assert kinds["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    selector = kinds["Service"]["spec"]["selector"]
    assert selector.items() <= template["metadata"]["labels"].items()
    monitored = kinds["ServiceMonitor"]["spec"]["selector"]["matchLabels"]
    assert monitored.items() <= kinds["Service"]["metadata"]["labels"].items()
    claim = next(v for v in pod["volumes"] if v["name"] == "models")
    name = claim["persistentVolumeClaim"]["claimName"]
    assert name == kinds["PersistentVolumeClaim"]["metadata"]["name"]


def test_a_pod_lives_as_long_as_the_start_and_the_drain_may_take() -> None:
    values = {
        "probes": {"startSeconds": 301, "deadSeconds": 45},
        "preStopSeconds": 7,
        "terminationGracePeriodSeconds": 60,
    }
    pod = render(values)["Deployment"]["spec"]["template"]["spec"]
    server = pod["containers"][0]
    start, live = server["startupProbe"], server["livenessProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] == 310
    assert live["periodSeconds"] * live["failureThreshold"] == 50
    assert pod["terminationGracePeriodSeconds"] == 67
    assert server["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "7"]


def test_nothing_runs_as_root_or_writes_to_the_image() -> None:
    pod = render(ALL_ON)["Deployment"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    for container in (*pod["containers"], *pod["initContainers"]):
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize(
    "values",
    [
        {"replica": 1},
        {"image": {"tag": ""}},
        {"model": {"path": "relative"}},
        {"storage": {"size": "100 GB"}},
        {"download": {"endpoint": "mirror"}},
        {"service": {"port": 70_000}},
        {"metrics": {"serviceMonitor": {"interval": "soon"}}},
        {"podDisruptionBudget": {"minAvailable": "some"}},
    ],
    ids=str,
)
def test_the_schema_refuses(values: dict[str, Any]) -> None:
    # Helm names the path of the value.
    path = ".*".join(_keys(values))
    with pytest.raises(helm_python.HelmError, match=f"(?s){path}"):
        render(values)


def _keys(values: dict[str, Any]) -> list[str]:
    ((key, value),) = values.items()
    return [key, *(_keys(value) if isinstance(value, dict) else [])]


@pytest.mark.parametrize(
    ("download", "needed"),
    [
        ({"storage": {"enabled": False}}, "storage.enabled"),
        ({"model": {"path": "/opt/demo"}}, "model.path"),
        ({"download": {"enabled": True}}, "download.source"),
    ],
)
def test_a_download_without_a_place_is_refused(
    download: dict[str, Any], needed: str
) -> None:
    values = {
        "storage": {"enabled": True},
        "model": {"path": "/mnt/models/a"},
        "download": {"enabled": True, "source": "a/b"},
    }
    with pytest.raises(helm_python.HelmError, match=needed):
        render(values | download)
