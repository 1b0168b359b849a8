"""The verb `transfer`."""

import argparse
from typing import get_type_hints

from simsiam.commands.arguments import add_device, add_precision, add_run, add_setting_flags
from simsiam.detection.schedules import SCHEDULES, Schedule

HELP = (
    "fine-tune a backbone as a detector on annotated images; "
    "writes RUN/transfers/TASK.json and a picture"
)
GROUP = "evaluation"
USAGE = (
    "simsiam transfer RUN SOURCE [SOURCE ...] [--task NAME] [--schedule NAME] [--FLAG VALUE ...]"
)
EPILOG = (
    "Brackets show the values for VOC07+12, the paper's. The schedule replaces some of them; "
    "a flag overrides it. If interrupted, run the same command again to go on."
)
MULTI_PROCESS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    add_run(parser)
    note = (
        "Pascal VOC folders (VOC2007, VOC2012:train), a folder of COCO's JSON files and images, "
        "or shapes (embedded)"
    )
    parser.add_argument("source", metavar="SOURCE", nargs="+", help=note)
    note = "detection or segmentation [detection]"
    parser.add_argument("--task", metavar="NAME", default="detection", help=note)
    note = f"{', '.join(SCHEDULES)} (the paper's), or auto: chosen by the number of images [auto]"
    parser.add_argument("--schedule", metavar="NAME", default="auto", help=note)
    note = "start from a run folder, a checkpoint or published weights [RUN's backbone]"
    parser.add_argument("--init", metavar="WEIGHTS", help=note)
    parser.add_argument("--from-scratch", action="store_true", help="start from random weights")
    note = "random seed of new weights and of all training steps [0]"
    parser.add_argument("--seed", metavar="N", type=int, default=0, help=note)
    add_device(parser)
    add_precision(parser)
    add_setting_flags(parser, Schedule, "schedule settings", get_type_hints(Schedule))


def run(options: argparse.Namespace) -> None:
    """Run the verb.

    Args:
        options: The parsed arguments.
    """
    from simsiam.detection.transfer import transfer

    transfer(**vars(options))
