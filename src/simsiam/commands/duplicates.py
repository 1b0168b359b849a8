"""The verb `duplicates`."""

import argparse

from simsiam.commands.arguments import add_csv, add_embeddings, add_html
from simsiam.commands.output import print_lines

HELP = "find groups of copies of the same image, including resized and recompressed copies"
GROUP = "embeddings"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    add_embeddings(parser)
    note = (
        "two images are copies if their distance is at most X. In a group, every image is within X "
        "of the group's first image. To compute the distance, both images are divided into tiles. "
        "Each tile is compared with the tile at the same place in the other image: their "
        "difference is divided by the contrast of the two tiles. The largest of these values is "
        "the distance. For unrelated images it is about 0.47 [0.28]"
    )
    parser.add_argument(
        "--threshold", metavar="X", type=float, default=argparse.SUPPRESS, help=note
    )
    note = (
        "find crops and mirrored copies as well; reads all images again and needs OpenCV (pip "
        'install "simsiam[crops]")'
    )
    parser.add_argument("--crops", action="store_true", help=note)
    note = (
        "where the images are. Without it, the place in FILE.parquet is used, if you have named it "
        "in the `simsiam embed` that wrote the file, or for its run [as in FILE.parquet]"
    )
    parser.add_argument("--source", metavar="SOURCE", nargs="+", help=note)
    add_csv(parser, "group, path, distance and note")
    add_html(parser, "the groups")


def run(options: argparse.Namespace) -> None:
    """Run the verb.

    Args:
        options: The parsed arguments.
    """
    from simsiam.embeddings.duplicates import duplicates, format_duplicates

    print_lines(format_duplicates(duplicates(**vars(options))))
