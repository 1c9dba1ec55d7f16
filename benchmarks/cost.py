"""What a million summaries cost: `python -m benchmarks.cost --measured RESULT --price NAME=DOLLARS_AN_HOUR=REPLICAS`.

Dollars = 1,000,000 / (answers a second of one replica x 3,600 x replicas x utilisation) x price of an hour. The answers
a second are those of `benchmarks.ray_serve`'s RESULT: one replica with every slot full, on one core of the machine that
it names. That another machine's core does as much is the caller's claim, as are price and number of replicas. Knows no
price.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.report import format_table
from benchmarks.simulate import read

SUMMARIES = 1_000_000


def dollars(rate: float, replicas: int, utilisation: float, price: float) -> float:
    """Of a million summaries, on machines that hold so many replicas each."""
    return SUMMARIES / (rate * 3600 * replicas * utilisation) * price


def priced(argument: str) -> tuple[str, float, int]:
    """`NAME=DOLLARS=REPLICAS`.

    Raises:
        ArgumentTypeError: it is not.
    """
    try:
        name, price, replicas = argument.split("=")
        found = name, float(price), int(replicas)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{argument!r} is not NAME=DOLLARS_AN_HOUR=REPLICAS") from None
    if found[1] <= 0 or found[2] < 1:
        raise argparse.ArgumentTypeError(f"{argument!r}: the price must be above 0, and replicas at least 1")
    return found


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, required=True, help="what benchmarks.ray_serve kept")
    parser.add_argument("--price", type=priced, action="append", required=True, metavar="NAME=DOLLARS=REPLICAS")
    parser.add_argument("--utilisation", type=float, nargs="+", default=[1.0, 0.7, 0.3])
    args = parser.parse_args()
    measured = read(args.measured)
    print(f"{measured.rate:.2f} answers a second of one replica, from {args.measured}\n")
    rows = [
        [
            name,
            f"{price:g}",
            replicas,
            *(f"{dollars(measured.rate, replicas, utilisation, price):.2f}" for utilisation in args.utilisation),
        ]
        for name, price, replicas in args.price
    ]
    print(format_table(["instance", "$/h", "replicas", *(f"$ at {u:.0%}" for u in args.utilisation)], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
