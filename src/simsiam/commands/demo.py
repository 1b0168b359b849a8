"""The verb `demo`."""

import argparse

HELP = "pretrain on the embedded images and compare with baselines and an upper bound"
GROUP = "laboratory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    note = "number of runs to average over [1]"
    parser.add_argument("--seeds", metavar="N", type=int, default=1, help=note)
    note = "folder that the run folders go into [runs/demo-N]"
    parser.add_argument("--out", metavar="FOLDER", help=note)


def run(options: argparse.Namespace) -> None:
    """Run the verb.

    Args:
        options: The parsed arguments.
    """
    from simsiam.laboratory.demo import demo

    demo(seeds=options.seeds, out=options.out)
