"""The verb `bench`."""

import argparse

from simsiam.commands.arguments import add_device

HELP = "measure speed, and compare it with plain implementations of the same work"
GROUP = "laboratory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    note = "measure only these cases; an unknown name prints the list of names [all]"
    parser.add_argument("--only", metavar="CASE", nargs="+", default=(), help=note)
    add_device(parser)
    parser.add_argument(
        "--out",
        metavar="FILE.json",
        help="write all measurements to this JSON file; `simsiam plan --bench` reads it",
    )


def run(options: argparse.Namespace) -> None:
    """Run the verb.

    Args:
        options: The parsed arguments.
    """
    from simsiam.laboratory.bench import bench

    bench(**vars(options))
