"""What the container and monitoring files say agrees with the code and with one another; nothing is run here."""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from app.metrics import Metrics
from tests.service import FakeEngine
from tests.shipped import ROOT

DEPLOY = ROOT / "deploy"
RULES = (DEPLOY / "prometheus" / "rules.yml").read_text()
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "precis.json").read_text())
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = PYPROJECT["project"]["version"]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
# Not a metric: what an alert or a rule is called begins otherwise, and the job is called precis.
METRIC = re.compile(r"(?<![\w:])precis_\w+")


def exposed() -> set[str]:
    """The name of every sample that a scrape of the service can have."""
    metrics = Metrics()
    metrics.watch_engine(FakeEngine().stats, lambda: 0.0)
    ends = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    # Not the samples: a metric with labels has none before it counts.
    families = text_string_to_metric_families(metrics.render().decode())
    return {f.name + end for f in families if not f.name.endswith("_created") for end in ends[f.type]}


@pytest.mark.parametrize("text", [RULES, json.dumps(DASHBOARD)], ids=["rules", "dashboard"])
def test_every_metric_that_is_asked_for_is_exposed(text: str) -> None:
    asked = set(METRIC.findall(text))
    assert len(asked) > 5
    assert asked - exposed() == set()


def test_every_recorded_ratio_that_the_dashboard_shows_is_recorded() -> None:
    shown = set(re.findall(r"job:\w+:\w+", json.dumps(DASHBOARD)))
    assert shown
    assert shown <= set(re.findall(r"record: (\S+)", RULES))


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    places = [
        (x, y)
        for at in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(places) == len(set(places))
    assert max(x for x, _ in places) < 24


def test_panels_ask_the_source_that_is_provisioned() -> None:
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    asked = {t["datasource"]["uid"] for panel in PANELS for t in panel["targets"]} | {
        variable["datasource"]["uid"] for variable in DASHBOARD["templating"]["list"]
    }
    assert asked == {source["uid"]}


def test_provisioned_files_are_mounted_where_they_are_looked_for() -> None:
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/precis.yml").read_text())["providers"]
    grafana = COMPOSE["services"]["grafana"]
    targets = {volume.split(":")[1] for volume in grafana["volumes"]}
    assert {provider["options"]["path"], "/etc/grafana/provisioning"} <= targets
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"].startswith(provider["options"]["path"])


def test_every_alert_names_its_severity_and_a_page_that_exists() -> None:
    rules = [rule for group in yaml.safe_load(RULES)["groups"] for rule in group["rules"]]
    alerts = [rule for rule in rules if "alert" in rule]
    assert alerts
    for alert in alerts:
        assert alert["labels"]["severity"] in ("critical", "warning")
        for page in re.findall(r"docs/\w+\.md", alert["annotations"]["description"]):
            assert (ROOT / page).is_file()


def test_the_page_on_deployment_explains_every_alert_and_every_variable_of_compose() -> None:
    page = (ROOT / "docs" / "deployment.md").read_text()
    files = [(ROOT / name).read_text() for name in ("docker-compose.yml", "docker-compose.gpu.yml")]
    variables = set(re.findall(r"\$\{(\w+)", "".join(files)))
    named = set(re.findall(r"alert: (\w+)", RULES)) | variables
    assert sorted(name for name in named if f"`{name}`" not in page) == []


@pytest.mark.parametrize("name", sorted(COMPOSE["services"]))
def test_every_container_is_confined_and_its_image_has_a_version(name: str) -> None:
    service: dict[str, Any] = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
    assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))


@pytest.mark.parametrize("name", ["precis", "train"])
def test_on_a_gpu_triton_has_a_compiler_and_a_folder_for_what_it_compiles(name: str) -> None:
    service = yaml.safe_load((ROOT / "docker-compose.gpu.yml").read_text())["services"][name]
    assert service["build"]["args"]["DEBIAN_PACKAGES"].split() == ["gcc", "libc6-dev"]
    (folder,) = service["tmpfs"]
    path, _, options = folder.partition(":")
    assert path == service["environment"]["TRITON_CACHE_DIR"]
    assert "exec" in options.split(",")


def test_our_images_have_the_projects_version() -> None:
    assert {COMPOSE["services"][name]["image"] for name in ("precis", "train")} == {
        f"precis:{VERSION}",
        f"precis-train:{VERSION}",
    }
    assert f'image.version="{VERSION}"' in (ROOT / "Dockerfile").read_text()


def test_what_is_compiled_is_all_the_c_that_there_is_and_no_image_is_built_without_it() -> None:
    extensions = PYPROJECT["tool"]["setuptools"]["ext-modules"]
    named = {path for extension in extensions for path in (*extension["sources"], *extension.get("depends", []))}
    assert named == {str(path.relative_to(ROOT)) for path in (ROOT / "app").rglob("*.[ch]")}
    dockerfile = (ROOT / "Dockerfile").read_text()
    for extension in extensions:
        looked_for = re.escape(f"&& ls /opt/precis/{extension['name'].replace('.', '/')}.*.so") + r"(?: \\\n &&|\n\n)"
        assert len(re.findall(looked_for, dockerfile)) == dockerfile.count("--target /opt/precis .") == 2


def test_the_lock_has_a_hash_for_everything_and_torch_in_the_projects_version() -> None:
    for name in ("serve", "train"):
        entries = re.split(r"\n(?=[a-z])", (ROOT / "requirements" / f"{name}.txt").read_text())[1:]
        assert len(entries) > 50
        assert [entry.split()[0] for entry in entries if "--hash=sha256:" not in entry] == []
        assert not any(entry.startswith(("torch==", "nvidia", "triton")) for entry in entries)
    assert f'"{(ROOT / "requirements" / "torch.txt").read_text().strip()}"' in (ROOT / "pyproject.toml").read_text()
