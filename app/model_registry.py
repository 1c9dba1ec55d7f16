"""What to serve: finds a model by folder, store name or hub id, and proves that its files are the ones exported.

Knows the layout `model_store/<name>/<version>/` and `manifest.json`. Does not know what the files mean.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from app.errors import ModelCorrupt, ModelNotFound

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# Everything the service reads; of a hub repository nothing else is fetched. No pickle among it.
SERVED_FILES = (
    "*.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "decoder_tokenizer/tokenizer.json",  # where encoder and decoder have one each
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class ModelEntry:
    """A model on this disk.

    Attributes:
        revision: sha256 over the names and hashes of the files served: equal exactly if the model is.
        verified: whether a manifest vouched for every file.
    """

    name: str
    version: str
    folder: Path
    revision: str
    verified: bool


def find_model(model: str | None, store: Path, hub_token: str | None = None) -> ModelEntry:
    """Resolve the setting `PRECIS_MODEL` and verify what it names.

    Raises:
        ModelNotFound: nothing goes by that name.
        ModelCorrupt: a file is missing or not what the manifest says.
    """
    if model is None:
        names = sorted({name for name, _ in list_models(store)})
        if not names:
            raise ModelNotFound(
                f"no model in {store.absolute()}; export one, or set PRECIS_MODEL to a folder or a hub id"
            )
        model = names[0]
    elif (Path(model) / "config.json").is_file():
        return _from_folder(Path(model))
    name, _, version = model.partition("@")
    versions = [v for n, v in list_models(store) if n == name]
    if versions and (not version or version in versions):
        version = version or versions[-1]
        return load_entry(name, version, store / name / version)
    if not versions and _HUB_ID.fullmatch(model):
        return _from_hub(name, version or None, hub_token)
    known = ", ".join(f"{n}@{v}" for n, v in list_models(store)) or "nothing"
    raise ModelNotFound(f"{model} is neither a folder with a config.json nor in {store.absolute()}, which has {known}")


def list_models(store: Path) -> list[tuple[str, str]]:
    """Name and version of every entry, oldest version first; hidden folders are exports under way."""
    found = [
        (config.parent.parent.name, config.parent.name)
        for config in store.glob("*/*/config.json")
        if not config.parent.name.startswith(".") and not config.parent.parent.name.startswith(".")
    ]
    return sorted(found, key=lambda entry: (entry[0], version_key(entry[1])))


def version_key(version: str) -> list[tuple[int, int, str]]:
    """Sorts 1.10 after 1.9."""
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in re.findall(r"\d+|[^\d.]+", version)]


def load_entry(name: str, version: str, folder: Path) -> ModelEntry:
    """Hash every served file and compare with the manifest, where there is one.

    Raises:
        ModelCorrupt: a file is missing, unlisted, or differs in size or hash.
    """
    listed = _read_manifest(folder)
    present = {path.relative_to(folder).as_posix() for pattern in SERVED_FILES for path in folder.glob(pattern)}
    hashes = {}
    for file in sorted(present | set(listed or {})):
        path = folder / file
        if not path.is_file():
            raise ModelCorrupt(f"{path} is missing; {MANIFEST} lists it")
        if listed is not None and file not in listed:
            raise ModelCorrupt(f"{path} would be served but {MANIFEST} does not list it")
        if listed is not None and path.stat().st_size != listed[file][1]:
            raise ModelCorrupt(f"{path} has {path.stat().st_size} bytes; {MANIFEST} says {listed[file][1]}")
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if listed is not None and digest != listed[file][0]:
            raise ModelCorrupt(f"{path} has sha256 {digest}; {MANIFEST} says {listed[file][0]}")
        if file in present:
            hashes[file] = digest
    if listed is None:
        logger.warning("%s has no %s: its files are served unverified", folder, MANIFEST)
    lines = "".join(f"{digest}  {file}\n" for file, digest in sorted(hashes.items()))
    return ModelEntry(name, version, folder, hashlib.sha256(lines.encode()).hexdigest(), listed is not None)


def _read_manifest(folder: Path) -> dict[str, tuple[str, int]] | None:
    """sha256 and bytes of each file; None without a manifest."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        listed = {str(name): (str(entry["sha256"]), int(entry["bytes"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelCorrupt(f"{path} is not a manifest: {type(error).__name__}: {error}") from error
    for name in listed:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ModelCorrupt(f"{path} lists {name!r}, which is outside its folder")
    return listed


def _from_folder(folder: Path) -> ModelEntry:
    """A folder in the store keeps its name; any other is called after itself."""
    resolved = folder.resolve()
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        name, version = str(manifest["name"]), str(manifest["version"])
    except (OSError, ValueError, KeyError, TypeError):
        name, version = resolved.name, "unversioned"
    return load_entry(name, version, resolved)


def _from_hub(name: str, revision: str | None, token: str | None) -> ModelEntry:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(name, revision=revision, token=token, allow_patterns=list(SERVED_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelNotFound(
            f"{name} is not in the store and the hub did not give it: {type(error).__name__}"
        ) from error
    return load_entry(name, Path(folder).name, Path(folder))
