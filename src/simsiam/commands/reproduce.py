"""The verb `reproduce`."""

import argparse

from simsiam.commands.arguments import PAPER_NOTE, add_device, add_no_labels
from simsiam.laboratory.experiments import EXPERIMENTS
from simsiam.laboratory.scales import SCALES

HELP = (
    "repeat tables and figures of the paper, and write "
    "results/SCALE/EXPERIMENT.md, .csv, .svg, .png and .json; of switches also .html"
)
GROUP = "laboratory"
USAGE = "simsiam reproduce EXPERIMENT [EXPERIMENT ...] [--scale NAME] [--FLAG VALUE ...]"
EPILOG = (
    "The plan is printed first. Experiments share runs, and finished runs are reused. After "
    "an interruption, give the same command again to go on. Several processes that run the same "
    f"command at the same time divide the runs among themselves. {PAPER_NOTE}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    note = f"experiments: {', '.join(EXPERIMENTS)}, or all"
    parser.add_argument("experiments", metavar="EXPERIMENT", nargs="+", help=note)
    lengths = {
        name: f"{s.epochs} epochs" if s.epochs else "the paper's epochs"
        for name, s in SCALES.items()
    }
    scales = (f"{name} ({SCALES[name].dataset}, {text})" for name, text in lengths.items())
    note = f"data set, network and length of training: {', '.join(scales)} [tiny]"
    parser.add_argument("--scale", metavar="NAME", default="tiny", help=note)
    note = "the images to train on [those of the scale]"
    parser.add_argument("--source", metavar="SOURCE", nargs="+", default=(), help=note)
    note = (
        "number of runs of each configuration, with different random seeds [3; 5 for figure2; 1 "
        "for switches, 2 for its middle batch]"
    )
    parser.add_argument("--seeds", metavar="N", type=int, help=note)
    note = (
        "epochs of each run; for table4 and table_c1, which train for several lengths, N replaces "
        "100 epochs and the other lengths are scaled by N/100 [those of the scale]"
    )
    parser.add_argument("--epochs", metavar="N", type=int, help=note)
    note = "train on N images only [all]"
    parser.add_argument("--limit", metavar="N", type=int, help=note)
    add_no_labels(parser)
    note = (
        "run only these configurations of an experiment; an unknown name prints the list of names "
        "[all]"
    )
    parser.add_argument("--only", metavar="CELL", nargs="+", default=(), help=note)
    note = (
        "annotated images for table5: VOCdevkit, another folder in Pascal VOC format, a folder "
        "of COCO 2017, or shapes (built-in data set) [shapes]"
    )
    parser.add_argument("--annotated", metavar="FOLDER", nargs="+", default=("shapes",), help=note)
    note = "folder for pages and figures [results/SCALE]"
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
