"""Which packages a run may report its log to, by name (`report_to`).

Does not report anything itself: the Trainer does.
"""

from __future__ import annotations

from importlib.util import find_spec

from train.config import ConfigError

TRACKERS = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}


def check_tracker(report_to: str) -> None:
    """Whether the package that `report_to` names is there.

    Raises:
        ConfigError: it is not.
    """
    package = TRACKERS.get(report_to)
    if package is not None and find_spec(package) is None:
        how = "precis[follow]" if package == "tensorboard" else package
        raise ConfigError(f"report_to is {report_to}, and its package is not installed: pip install '{how}'")
