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
    note = (
        "measure only these cases; an unknown name prints the list of names. time_to_accuracy, "
        "which takes hours, is measured only if it is named: minutes of training to levels of kNN "
        "accuracy, beside a plain loop and features in closed form [all others]"
    )
    parser.add_argument("--only", metavar="CASE", nargs="+", default=(), help=note)
    note = "with --only time_to_accuracy: labeled images with a test split"
    parser.add_argument("--source", metavar="SOURCE", default="cifar10", help=f"{note} [cifar10]")
    note = "with --only time_to_accuracy: passes over the training images"
    parser.add_argument("--epochs", metavar="N", type=int, default=12, help=f"{note} [12]")
    note = "with --only time_to_accuracy: number of seeds"
    parser.add_argument("--seeds", metavar="N", type=int, default=3, help=f"{note} [3]")
    add_device(parser)
    parser.add_argument(
        "--out",
        metavar="FILE.json",
        help="write all measurements to this JSON file; `simsiam plan --bench` reads it; with "
        "time_to_accuracy also a figure, and a folder with the runs, from which it goes on",
    )


def run(options: argparse.Namespace) -> None:
    """Run the verb.

    Args:
        options: The parsed arguments.
    """
    from simsiam.laboratory.bench import bench

    bench(**vars(options))
