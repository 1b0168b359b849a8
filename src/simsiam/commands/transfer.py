"""The verb `transfer`."""

import argparse
from typing import get_type_hints

from simsiam.commands.arguments import (
    PAPER_NOTE,
    add_backbone,
    add_device,
    add_precision,
    add_run,
    add_setting_flags,
)
from simsiam.detection.schedules import SCHEDULES, Schedule

HELP = (
    "fine-tune a backbone for object detection or segmentation, and write "
    "RUN/transfers/TASK.json and a picture of what it finds"
)
GROUP = "evaluation"
USAGE = (
    "simsiam transfer RUN SOURCE [SOURCE ...] [--task NAME] [--schedule NAME] [--FLAG VALUE ...]"
)
EPILOG = (
    "Under `schedule settings`, values in brackets are those of --schedule voc0712, the paper's "
    "for VOC07+12. Other schedules, and auto, change some of them; a flag overrides the schedule. "
    f"After an interruption, give the same command again to go on. {PAPER_NOTE}"
)
MULTI_PROCESS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    add_run(parser)
    note = (
        "annotated images: one or more folders in Pascal VOC format (FOLDER:train takes only "
        "the images in its list train.txt), a folder in COCO format, or shapes (built-in "
        "data set)"
    )
    parser.add_argument("source", metavar="SOURCE", nargs="+", help=note)
    note = "detection or segmentation [detection]"
    parser.add_argument("--task", metavar="NAME", default="detection", help=note)
    note = (
        f"settings for a data set: {', '.join(SCHEDULES)}, or auto, which depends on the number "
        "of images [auto]"
    )
    parser.add_argument("--schedule", metavar="NAME", default="auto", help=note)
    note = (
        "weights to start from, which must be those of a ResNet: a run folder, timm:NAME, "
        "hf-hub:OWNER/NAME, a name of torchvision such as ResNet50_Weights.IMAGENET1K_V2, or a "
        "file; RUN still receives the results [the weights of RUN]"
    )
    parser.add_argument("--init", metavar="WEIGHTS", help=note)
    add_backbone(parser, "--init")
    parser.add_argument("--from-scratch", action="store_true", help="start from random weights")
    note = "random seed of new weights and of training [0]"
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
