"""The verb `plan`."""

import argparse

from simsiam.commands.arguments import SETTINGS_NOTE, add_recipe_flags, add_source

HELP = (
    "estimate the steps, hours, memory, disk space and reading speed that pretraining needs, "
    "and print the assumptions"
)
GROUP = "data"
USAGE = (
    "simsiam plan SOURCE [SOURCE ...] [--gpus N] [--images N] [--bench FILE.json ...] "
    "[--FLAG VALUE ...]"
)
EPILOG = f"The settings are those of `simsiam pretrain`. {SETTINGS_NOTE}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    add_source(parser, "+")
    note = "number of training processes; each uses one GPU [1]"
    parser.add_argument("--gpus", metavar="N", type=int, default=1, help=note)
    note = "plan for N images like those of the source [number of images in the source]"
    parser.add_argument("--images", metavar="N", type=int, help=note)
    note = "CPU cores per process, for decoding images [cores of this machine]"
    parser.add_argument("--cores", metavar="N", type=int, help=note)
    note = (
        "files that `simsiam bench --out` wrote on the machine that will train "
        "[measure the speed on this machine]"
    )
    parser.add_argument("--bench", metavar="FILE.json", nargs="+", help=note)
    parser.add_argument(
        "--out", metavar="FILE.json", help="also write the results to this JSON file"
    )
    add_recipe_flags(parser)


def run(options: argparse.Namespace) -> None:
    """Run the verb.

    Args:
        options: The parsed arguments.
    """
    from simsiam.training.plan import plan

    settings = vars(options)
    plan(settings.pop("source"), **settings)
