"""The verb `plan`."""

import argparse

from simsiam.commands.arguments import add_recipe_flags, add_source

HELP = (
    "estimate what pretraining needs: steps, hours, memory, checkpoints, storage and reading, "
    "with the assumptions made"
)
GROUP = "data"
USAGE = (
    "simsiam plan SOURCE [SOURCE ...] [--gpus N] [--images N] [--bench FILE.json ...] "
    "[--FLAG VALUE ...]"
)
EPILOG = "The settings are those of `simsiam pretrain`, with the same values by default."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    add_source(parser, "+")
    note = "number of processes, one for each device [1]"
    parser.add_argument("--gpus", metavar="N", type=int, default=1, help=note)
    note = "plan for N images like those of the source [as many as the source has]"
    parser.add_argument("--images", metavar="N", type=int, help=note)
    note = "CPU cores of each process, for preparing images [those of this machine]"
    parser.add_argument("--cores", metavar="N", type=int, help=note)
    note = "results of `simsiam bench --out` on the machine that will train"
    parser.add_argument("--bench", metavar="FILE.json", nargs="+", help=note)
    parser.add_argument("--out", metavar="FILE.json", help="also write the facts to this file")
    add_recipe_flags(parser)


def run(options: argparse.Namespace) -> None:
    """Run the verb.

    Args:
        options: The parsed arguments.
    """
    from simsiam.training.plan import plan

    settings = vars(options)
    plan(settings.pop("source"), **settings)
