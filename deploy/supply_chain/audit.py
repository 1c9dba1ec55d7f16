"""Whether a known vulnerability is in what the images install: `python -m deploy.supply_chain.audit FILE...`.

pip-audit asks the advisory service (OSV); this script makes its answer one of three, where pip-audit has two:

    0   every package was asked about, and none has a known vulnerability
    1   some have: each is named, with the version that mends it
    75  could not ask: the service does not answer, or answers what cannot be true, or left packages out

Without the third, a closed network looks like a clean bill: pip-audit skips what its default service has no page for,
and says that it found nothing. So the service is asked first about CONTROL, whose vulnerabilities any such service
knows. Anything else that goes wrong is an error of this check: 2. `--unreachable warn` makes 75 a 0 that says so, for
builds behind a closed network; a release does not use it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

OSV = "https://api.osv.dev/v1/query"
CONTROL = {"package": {"name": "jinja2", "ecosystem": "PyPI"}, "version": "2.4.1"}  # of 2010, with advisories since
CLEAN, FOUND, BROKEN, COULD_NOT_ASK = 0, 1, 2, 75
PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^ ;\\]+)", re.MULTILINE)


@dataclass(frozen=True)
class Audit:
    """What came of it: the exit status, and lines that say why."""

    status: int
    lines: tuple[str, ...]


def control(url: str, timeout: float = 15.0) -> str | None:
    """Why the service cannot be asked, or None where it knows what every such service knows."""
    try:
        reply = httpx.post(url, json=CONTROL, timeout=timeout)
        known = reply.raise_for_status().json()["vulns"]
    except httpx.HTTPError as error:
        return f"{url}: {error or type(error).__name__}"
    except (ValueError, KeyError, TypeError):
        return f"{url} does not answer as an OSV service: it names no vulnerability of jinja2 2.4.1, which has some"
    return None if known else f"{url} names no vulnerability of jinja2 2.4.1, which has some"


def pins(files: list[Path]) -> dict[str, str]:
    """Package -> version, of all files."""
    return {name.lower(): version for file in files for name, version in PIN.findall(file.read_text(encoding="utf-8"))}


def audit(files: list[Path], url: str = OSV) -> Audit:
    """Ask about everything that is pinned in these files."""
    asked = pins(files)
    if not asked:
        return Audit(BROKEN, (f"nothing is pinned in {', '.join(map(str, files))}",))
    if reason := control(url):
        return Audit(COULD_NOT_ASK, (f"could not ask about {len(asked)} packages: {reason}",))
    # Without the hashes: pip-audit refuses a mixture, and torch has none here.
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write("".join(f"{name}=={version}\n" for name, version in asked.items()))
        file.flush()
        command = [sys.executable, "-m", "pip_audit", "--requirement", file.name, "--disable-pip", "--no-deps"]
        command += ["--vulnerability-service", "osv", "--osv-url", url, "--format", "json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    try:
        answered = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        return Audit(BROKEN, ("pip-audit gave no answer:", *done.stderr.splitlines()[-5:]))
    return judge(asked, answered)


def judge(asked: dict[str, str], answered: list[dict[str, Any]]) -> Audit:
    """What pip-audit's report means for the packages that were asked about."""
    found = [
        f"{package['name']} {package['version']}: {vulnerability['id']}"
        f" ({', '.join(vulnerability['aliases']) or 'no alias'}),"
        f" mended in {', '.join(vulnerability['fix_versions']) or 'no version yet'}"
        for package in answered
        for vulnerability in package.get("vulns", [])
    ]
    if found:
        return Audit(FOUND, tuple(found))
    known = {package["name"].lower() for package in answered if "skip_reason" not in package}
    if missing := sorted(asked.keys() - known):
        return Audit(COULD_NOT_ASK, (f"no answer about {len(missing)} packages: {', '.join(missing)}",))
    return Audit(CLEAN, (f"{len(asked)} packages, none with a known vulnerability",))


def main() -> int:
    """Print what was found; the exit statuses stand above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="requirements with exact versions")
    parser.add_argument("--osv-url", default=OSV)
    parser.add_argument("--unreachable", choices=("fail", "warn"), default="fail", help="what 75 means")
    args = parser.parse_args()
    result = audit(args.files, args.osv_url)
    words = {CLEAN: "clean", FOUND: "FOUND", BROKEN: "BROKEN", COULD_NOT_ASK: "COULD NOT ASK"}[result.status]
    for line in result.lines:
        print(f"audit: {words}: {line}")
    if result.status == COULD_NOT_ASK and args.unreachable == "warn":
        print("audit: nothing is known about vulnerabilities; --unreachable warn lets this pass")
        return CLEAN
    return result.status


if __name__ == "__main__":
    sys.exit(main())
