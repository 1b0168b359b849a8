"""The verb `demo`."""

import argparse

HELP = (
    "pretrain on the built-in data set `shapes`, and compare kNN accuracy with that of raw pixels, "
    "an untrained network and supervised training"
)
GROUP = "laboratory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    note = "number of random seeds to average over [1]"
    parser.add_argument("--seeds", metavar="N", type=int, default=1, help=note)
    note = "folder for the run folders [runs/demo-N]"
    parser.add_argument("--out", metavar="FOLDER", help=note)


def run(options: argparse.Namespace) -> None:
    """Run the verb.

    Args:
        options: The parsed arguments.
    """
    from simsiam.laboratory.demo import demo

    demo(seeds=options.seeds, out=options.out)
