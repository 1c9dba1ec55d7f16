"""What the image of the service promises: what runs in it, as whom, what it may write, how it starts and ends."""

from __future__ import annotations

import json
import re
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import yaml

from tests.container.conftest import COMPILER_IMAGE, IMAGE, Container, composed, docker, docker_ok, inspect, run
from tests.service import read_settings
from tests.shipped import CONVERSATIONS, ROOT, shipped_folder

LARGEST = 1_200_000_000  # bytes of the CPU image; most of it is torch
NO_SHELL = [f"--volume=/dev/null:/usr/bin/{shell}:ro" for shell in ("dash", "bash")]


def test_a_post_to_the_composed_service_is_a_summary(container: Container, capsys: pytest.CaptureFixture[str]) -> None:
    asked = {"inputs": list(CONVERSATIONS), "parameters": {"generate_parameters": {"num_beams": 4}}}
    reply = httpx.post(f"{container.url}/summarize", json=asked, timeout=60)
    with capsys.disabled():
        print(f"\n\nPOST {container.url}/summarize: {reply.status_code}\n{json.dumps(reply.json(), indent=1)}")
    assert reply.status_code == 200
    assert len(reply.json()) == len(CONVERSATIONS)
    assert all(len(summary["summary_text"].split()) > 3 for summary in reply.json())


def test_it_serves_the_checkpoint_that_the_repository_ships(container: Container) -> None:
    folder = shipped_folder()
    assert folder is not None
    served = httpx.get(f"{container.url}/info").json()
    assert (served["model"]["name"], served["model"]["version"]) == (folder.parent.name, folder.name)


def test_it_runs_as_10001_and_writes_nowhere_but_to_tmp(container: Container) -> None:
    code = (
        "import os, pathlib\n"
        "assert os.getuid() == os.getgid() == 10001 and not os.getgroups()[1:]\n"
        "pathlib.Path('/tmp/new').write_text('')\n"
        "for folder in ('/', '/srv', '/opt/precis', '/opt/venv', '/srv/model_store', '/usr', '/var/tmp'):\n"
        "    try:\n"
        "        pathlib.Path(folder, 'new').write_text('')\n"
        "    except OSError:\n"
        "        continue\n"
        "    raise SystemExit(f'{folder} can be written to')\n"
    )
    done = container.python(code)
    assert done.returncode == 0, done.stderr
    assert inspect(container.name)["HostConfig"]["CapDrop"] == ["ALL"]


def test_its_packages_are_those_of_the_lock_and_torch_and_itself(container: Container) -> None:
    code = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    installed = {
        re.sub(r"[-_.]+", "-", name).lower(): v for name, v in json.loads(container.python(code).stdout).items()
    }
    torch = installed.pop("torch").partition("+")[0]
    version = installed.pop("precis")
    lock = (ROOT / "requirements" / "serve.txt").read_text()
    assert installed == dict(re.findall(r"^([a-z0-9-]+)==(\S+)", lock, re.MULTILINE))
    assert f"torch=={torch}" == (ROOT / "requirements" / "torch.txt").read_text().strip()
    assert version == httpx.get(f"{container.url}/info").json()["versions"]["precis"]


def test_its_kernels_for_a_cpu_are_compiled(container: Container) -> None:
    """With torch's own OpenMP: Debian's is not in the image, and a second one would have threads of its own."""
    code = (
        "import pathlib, torch\n"
        "from app.engine.kernels import cpu_kernels\n"
        "if torch.backends.cpu.get_cpu_capability() == 'DEFAULT':\n"
        "    raise SystemExit('no AVX2')\n"
        "assert cpu_kernels()\n"
        "mapped = pathlib.Path('/proc/self/maps').read_text().split()\n"
        "(openmp,) = {path for path in mapped if '/libgomp' in path}\n"
        "assert pathlib.Path(openmp).is_relative_to(pathlib.Path(torch.__file__).parent)\n"
    )
    done = container.python(code)
    if done.stderr.endswith("no AVX2\n"):
        pytest.skip("this processor has no AVX2")
    assert done.returncode == 0, done.stderr


def test_the_image_is_small() -> None:
    assert inspect(IMAGE)["Size"] < LARGEST


def test_the_image_says_what_it_is() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    config = inspect(IMAGE)["Config"]
    assert config["Labels"]["org.opencontainers.image.version"] == project["version"]
    assert config["Labels"]["org.opencontainers.image.licenses"] == project["license"]
    assert (config["User"], config["StopSignal"]) == ("10001:10001", "SIGTERM")


@pytest.mark.parametrize("init", [[], ["--init"]], ids=["as first process", "below an init"])
def test_it_starts_and_is_healthy_without_a_shell(init: list[str]) -> None:
    store = f"--volume={ROOT / 'model_store'}:/srv/model_store:ro"
    with run(*init, *NO_SHELL, store, "-e", "PRECIS_ALLOW_ANONYMOUS=true", IMAGE, port=8000) as started:
        assert docker("exec", started.name, "sh", "-c", "true").returncode != 0
        assert httpx.post(f"{started.url}/summarize", json={"inputs": CONVERSATIONS[0]}, timeout=60).is_success


@pytest.mark.skipif(COMPILER_IMAGE is None, reason="PRECIS_COMPILER_IMAGE names no image: docs/deployment.md")
def test_with_a_compiler_a_library_is_made_and_loaded_where_the_gpu_file_lets_triton() -> None:
    """As Triton makes its own: with Python's headers, beside its kernels; nothing can be loaded from /tmp."""
    own, gpu = (
        yaml.safe_load((ROOT / name).read_text())["services"]["precis"]
        for name in ("docker-compose.yml", "docker-compose.gpu.yml")
    )
    code = (
        "import ctypes, os, pathlib, subprocess, sysconfig\n"
        "def load(folder):\n"
        "    source, made = pathlib.Path(folder, 'stub.c'), pathlib.Path(folder, 'stub.so')\n"
        "    source.write_text('#include <Python.h>\\nint answer(void) { return PY_MAJOR_VERSION; }')\n"
        "    scheme = sysconfig.get_default_scheme().replace('posix_local', 'posix_prefix')\n"
        "    include = sysconfig.get_path('include', scheme)\n"
        "    subprocess.run(['gcc', source, '-O3', '-shared', '-fPIC', f'-I{include}', '-o', made], check=True)\n"
        "    return ctypes.CDLL(str(made)).answer()\n"
        "assert load(os.environ['TRITON_CACHE_DIR']) == 3\n"
        "try:\n"
        "    load('/tmp')\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    folders = [f"--tmpfs={folder}" for folder in (*own["tmpfs"], *gpu["tmpfs"])]
    cache = f"TRITON_CACHE_DIR={gpu['environment']['TRITON_CACHE_DIR']}"
    confined = ("--read-only", "--cap-drop=ALL", *folders, "-e", cache, "--entrypoint=python")
    assert "failed to map segment" in docker_ok("run", "--rm", *confined, COMPILER_IMAGE, "-c", code)


def test_the_argument_serve_is_sagemakers_container() -> None:
    model = f"--volume={shipped_folder()}:/opt/ml/model:ro"
    with run("--init", model, IMAGE, "serve", port=8080) as started:  # healthy on SageMaker's port
        assert httpx.get(f"{started.url}/ping").is_success
        reply = httpx.post(f"{started.url}/invocations", json={"inputs": CONVERSATIONS[0]}, timeout=60)
        assert reply.json()[0]["summary_text"]


def test_a_stop_lets_the_work_in_flight_finish_and_exits_0() -> None:
    with composed("precis-stopped", PRECIS_NUM_THREADS="1") as started, ThreadPoolExecutor(1) as pool:
        asked = {"inputs": list(CONVERSATIONS) * 4, "parameters": {"generate_parameters": {"num_beams": 8}}}
        reply = pool.submit(httpx.post, f"{started.url}/summarize", json=asked, timeout=60)
        _wait_until_running(started.url)
        settings = read_settings()
        assert inspect(started.name)["Config"]["StopTimeout"] > settings.drain_delay + settings.drain_timeout
        began = time.monotonic()
        docker_ok("stop", started.name)  # waits as long as stop_grace_period says
        took = time.monotonic() - began
        assert reply.result().status_code == 200
        assert len(reply.result().json()) == len(asked["inputs"])
        assert inspect(started.name)["State"]["ExitCode"] == 0
        assert took < 40


def _wait_until_running(url: str) -> None:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        if any(line.startswith("precis_running ") and float(line.split()[1]) > 0 for line in lines):
            return
        time.sleep(0.02)
    raise AssertionError("no text began to run")


def test_a_wrong_setting_ends_the_container_with_2_and_its_name() -> None:
    done = docker("run", "--rm", "-e", "PRECIS_MAX_NUM_SEQS=none", IMAGE)
    assert done.returncode == 2
    assert "PRECIS_MAX_NUM_SEQS" in done.stderr


def test_without_keys_and_without_the_word_of_its_operator_it_does_not_start() -> None:
    done = docker("run", "--rm", IMAGE)
    assert done.returncode == 2
    assert "PRECIS_API_KEYS" in done.stderr
