"""The verb `reproduce`."""

import argparse

from simsiam.commands.arguments import add_device
from simsiam.laboratory.experiments import EXPERIMENTS
from simsiam.laboratory.scales import SCALES

HELP = (
    "repeat tables and figures of the paper; "
    "writes results/SCALE/EXPERIMENT.md, .csv, .svg, .png and .json"
)
GROUP = "laboratory"
USAGE = "simsiam reproduce EXPERIMENT [EXPERIMENT ...] [--scale NAME] [--FLAG VALUE ...]"
EPILOG = (
    "The plan is printed first. Experiments share runs, and finished runs are reused. If "
    "interrupted, run the same command again to go on; two processes of it share the work."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    note = f"{', '.join(EXPERIMENTS)}, or all"
    parser.add_argument("experiments", metavar="EXPERIMENT", nargs="+", help=note)
    note = f"{', '.join(SCALES)} [tiny]"
    parser.add_argument("--scale", metavar="NAME", default="tiny", help=note)
    note = "the images [those of the scale]"
    parser.add_argument("--source", metavar="SOURCE", nargs="+", default=(), help=note)
    note = "number of runs of each cell [3; 5 for figure2]"
    parser.add_argument("--seeds", metavar="N", type=int, help=note)
    note = "epochs that stand for 100 epochs of the paper [those of the scale]"
    parser.add_argument("--epochs", metavar="N", type=int, help=note)
    note = "train on N images only [all]"
    parser.add_argument("--limit", metavar="N", type=int, help=note)
    note = "run only these cells [all]"
    parser.add_argument("--only", metavar="CELL", nargs="+", default=(), help=note)
    note = "table5: VOCdevkit, a folder of COCO 2017, any VOC folder, or shapes (embedded) [shapes]"
    parser.add_argument("--annotated", metavar="FOLDER", nargs="+", default=("shapes",), help=note)
    note = "folder that pages and figures go into [results/SCALE]"
    parser.add_argument("--out", metavar="FOLDER", help=note)
    add_device(parser)
    parser.add_argument("--plan", action="store_true", help="print the plan and stop")


def run(options: argparse.Namespace) -> None:
    """Run the verb.

    Args:
        options: The parsed arguments.
    """
    from simsiam.laboratory.reproduce import reproduce

    reproduce(**vars(options))
