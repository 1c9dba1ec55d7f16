"""`python -m train finetune | evaluate | export`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from train.config import ConfigError, load_config
from train.data import DataError


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the words, run one command, and turn what the user got wrong into one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m train", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    finetune = commands.add_parser("finetune", help="warm-start and fine-tune a model")
    finetune.add_argument("--config", required=True, help="TOML file, see train/configs/")
    finetune.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of output_dir")
    finetune.add_argument("overrides", nargs="*", metavar="key=value", help="such as optim.epochs=1")
    args = parser.parse_args(argv)
    try:
        from train.finetune import finetune as run

        best = run(load_config(args.config, args.overrides), resume=args.resume)
        print(f"best model: {best}")
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
