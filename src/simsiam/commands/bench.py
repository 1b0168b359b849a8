"""The verb `bench`."""

import argparse

from simsiam.commands.arguments import add_device

HELP = "measure speed, and compare it with the common way to do the same"
GROUP = "laboratory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    note = "run only these cases; an unknown name prints the list of cases [all]"
    parser.add_argument("--only", metavar="CASE", nargs="+", default=(), help=note)
    add_device(parser)
    parser.add_argument("--out", metavar="FILE.json", help="write all measurements to this file")


def run(options: argparse.Namespace) -> None:
    """Run the verb.

    Args:
        options: The parsed arguments.
    """
    from simsiam.laboratory.bench import bench

    bench(**vars(options))
