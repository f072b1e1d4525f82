"""The files of deploy/ agree with SGLang, with the package and with each other."""

from __future__ import annotations

import argparse
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from sglang.srt.server_args import ServerArgs

from helpers.dockerfile import instructions
from sglang_dllm.decoding.registry import algorithms

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "sglang-dllm"
DOCKERFILES = ("cpu.Dockerfile", "gpu.Dockerfile")


def docker(name: str) -> list[tuple[str, str]]:
    return list(instructions((DEPLOY / name).read_text(encoding="utf-8")))


def loaded(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def runtime() -> Any:
    (container,) = loaded("kserve/serving-runtime.yaml")["spec"]["containers"]
    return container


def launches() -> Iterator[tuple[str, list[str]]]:
    """The launch flags of each place that starts a server."""
    for name in DOCKERFILES:
        yield name, json.loads(dict(docker(name))["CMD"])
    given = loaded("compose.yaml")["services"]["gpu"]["command"]
    # ${NAME:-default}
    yield "compose.yaml", [re.sub(r"\$\{\w+:-(.*?)\}", r"\1", one) for one in given]
    yield "kserve", runtime()["args"]
    template = (CHART / "templates" / "deployment.yaml").read_text(encoding="utf-8")
    values = loaded("helm/sglang-dllm/values.yaml")
    own = re.findall(r"^ +- (--(?!revision)[\w-]+=?.*)$", template, re.M)
    filled = []
    for one in own:
        for path in re.findall(r"{{ \.Values\.([\w.]+) }}", one):
            value = values
            for key in path.split("."):
                value = value[key]
            one = re.sub(r"{{.*?}}", str(value), one, count=1)
        filled.append(one)
    assert len(filled) == 8
    yield "helm", filled


@pytest.mark.parametrize(("name", "flags"), launches())
def test_sglang_knows_the_flags(name: str, flags: list[str]) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    ServerArgs.add_cli_args(parser)
    found = parser.parse_args(flags)
    assert found.dllm_algorithm in algorithms()
    assert (found.host, found.port) == ("0.0.0.0", 8080)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_has_a_supported_sglang(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (sglang,) = [
        one for one in map(Requirement, project["dependencies"]) if one.name == "sglang"
    ]
    args = dict(rest.split("=", 1) for what, rest in docker(name) if what == "ARG")
    assert args["SGLANG_VERSION"] in sglang.specifier


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_is_not_root_s_and_gets_the_signals(name: str) -> None:
    found = dict(docker(name))
    user, group = found["USER"].split(":")
    assert int(user) > 0 and group == "0"
    # The form of a list: no shell stands between Kubernetes and the server.
    assert isinstance(json.loads(found["ENTRYPOINT"]), list)
    assert found["EXPOSE"] == "8080"


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_build_sees_each_file_that_it_copies(name: str) -> None:
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    for what, rest in docker(name):
        if what == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists()
                assert f"!{source}" in kept


def test_the_wheel_needs_nothing_that_the_build_does_not_see() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = set(project["tool"]["setuptools"]["package-dir"].values())
    named = {project["project"]["readme"], *project["project"]["license-files"]}
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    assert {f"!{name}" for name in folders | named} <= set(kept)


def leaves(values: dict[str, Any], path: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and value and path + key != "podSecurityContext":
            yield from leaves(value, f"{path}{key}.")
        else:
            yield path + key


def test_each_value_of_the_chart_is_used_and_explained_by_the_schema() -> None:
    values = loaded("helm/sglang-dllm/values.yaml")
    text = "".join(p.read_text() for p in (CHART / "templates").iterdir())
    used = set(re.findall(r"\.Values\.([\w.]+)", text))
    # A value that is passed on whole.
    values["resources"] = {}
    assert set(leaves(values)) == used
    schema = json.loads((CHART / "values.schema.json").read_text())
    for path in used:
        part = schema
        for key in path.split("."):
            assert part.get("additionalProperties") is False
            part = part["properties"][key]


def test_the_probes_of_kserve_fit_a_start_and_the_server_s_route() -> None:
    container = runtime()
    (port,) = container["ports"]
    start = container["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] >= 600
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[name]["httpGet"] == {
            "path": "/health",
            "port": port["containerPort"],
        }
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    volumes = loaded("kserve/serving-runtime.yaml")["spec"]["volumes"]
    assert mounts == {volume["name"] for volume in volumes}


def test_the_inference_service_names_the_runtime_and_its_format() -> None:
    service = loaded("kserve/inference-service.yaml")["spec"]["predictor"]["model"]
    served = loaded("kserve/serving-runtime.yaml")
    assert service["runtime"] == served["metadata"]["name"]
    formats = {one["name"] for one in served["spec"]["supportedModelFormats"]}
    assert service["modelFormat"]["name"] in formats
