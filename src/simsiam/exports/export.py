"""The verb `export`: write the backbone of a run for other programs.

An export is a folder that appears complete or not at all. It holds the weights or the graph,
preprocessing.json, SHA256SUMS, and for the hub a model card. It is loaded again with the format's
own library and kept only if its features agree with those of the run's backbone.
"""

import os
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from simsiam.errors import UsageError, printable, unknown_name
from simsiam.exports import format_names
from simsiam.exports.format import Format, max_difference
from simsiam.exports.huggingface import upload_to_hub
from simsiam.exports.model_card import model_card
from simsiam.model.backbones import TIMM_PREFIX, feature_dim
from simsiam.model.encoder import Encoder
from simsiam.runs.encoder import load
from simsiam.runs.preprocessing import preprocessing_config
from simsiam.runs.run_folder import HEAD_FILE, Run
from simsiam.runs.weights import open_weights, run_folder_of
from simsiam.utils.checksums import write_sums
from simsiam.utils.files import atomic_folder
from simsiam.utils.typed_json import to_json

FORMATS: dict[str, Format] = {
    name: import_module(f"simsiam.exports.{name}").FORMAT for name in format_names()
}


class ExportResult(NamedTuple):
    """What was exported.

    Attributes:
        path: The folder.
        delta: Largest difference between a feature of the export and one of the run's backbone.
        load_code: The line of code that loads it.
        note: What was left out; "" if nothing was.
    """

    path: Path
    delta: float
    load_code: str
    note: str = ""


def export(
    run: str | os.PathLike[str],
    *,
    format: str,
    out: str | os.PathLike[str] | None = None,
    license: str | None = None,
    push: str | None = None,
    backbone: str | None = None,
) -> ExportResult:
    """Write the backbone of a run in a format of another program, and verify it.

    Args:
        run: The run folder, or weights (see `simsiam.runs.weights.open_weights`).
        format: The name of a format, one of FORMATS.
        out: The folder to write; it must not exist. The default is RUN/exports/FORMAT; weights
            have none.
        license: The license of the weights, for the model card of a huggingface export.
        push: "owner/name" of a repository to which a huggingface export is uploaded. Without it
            nothing is uploaded.
        backbone: The network of a file of weights.

    Returns:
        The folder, the largest difference of features, and the code that loads the export.

    Raises:
        UsageError: The network does not exist in this format, or a package is missing.
        WorkFailed: The features disagree, or the upload failed.
    """
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    if (push or license) and format != "huggingface":
        raise UsageError(f"push and license belong to format huggingface, not to {format}")
    kind = FORMATS[format]
    for package in kind.packages:
        require_package(package, format, kind.extra)
    if push:
        require_package("huggingface_hub", format, "hub")
    if out is None and run_folder_of(run) is None:
        raise UsageError(f"{printable(os.fspath(run))} is no run folder to write into: give --out")
    folder = Run(open_weights(run, backbone=backbone))
    network = load(folder.path, head=kind.holds != "backbone")
    if isinstance(network, Encoder) and network.patches is not None and kind.holds != "all":
        able = ", ".join(name for name, other in FORMATS.items() if other.holds == "all")
        raise UsageError(
            f"format {format} cannot hold the second branch of {folder.path}: use one of {able}"
        )
    recipe = folder.recipe
    path = Path(out) if out else folder.path / "exports" / format
    if path.exists():
        raise UsageError(
            f"{path} exists and is not written over: delete it, or choose another --out"
        )
    with atomic_folder(path) as part:
        kind.write(network, folder, part)
        config = to_json(preprocessing_config(recipe))
        (part / "preprocessing.json").write_text(config, "utf-8")
        if format == "huggingface":
            (part / "README.md").write_text(model_card(folder, license), "utf-8")
        delta = max_difference(network, kind.reload(part, recipe), recipe)
        write_sums(part)
    if push:
        upload_to_hub(path, push)
    name = recipe.backbone.removeprefix(TIMM_PREFIX)
    head = isinstance(network, Encoder) and network.head is not None
    options = {"num_classes": feature_dim(network)} if head else {}
    if name.startswith("vit_"):  # of torchvision; timm's folder says it itself
        options["image_size"] = recipe.image_size
    arguments = ", ".join(f"{option}={value}" for option, value in options.items())
    load_code = kind.load_code.format(path=path, backbone=name, arguments=arguments)
    left_out = folder.has_head and kind.holds == "backbone"
    note = f"{HEAD_FILE} is left out: {format} has the backbone alone" if left_out else ""
    return ExportResult(path, delta, load_code, note)


def require_package(package: str, format: str, extra: str) -> None:
    """Check that an optional package can be imported.

    Args:
        package: The package.
        format: The format that needs it.
        extra: The extra of this package that installs it.

    Raises:
        UsageError: It cannot.
    """
    try:
        import_module(package)
    except ImportError:
        raise UsageError(
            f'format {format} needs {package}: pip install "simsiam[{extra}]"'
        ) from None


def format_export(result: ExportResult) -> str:
    """Format what was exported as lines to print.

    Args:
        result: What `export` returned.
    """
    lines = [
        f"largest difference to the features of the run: {result.delta:.2g}",
        *([result.note] if result.note else []),
        f"load it with: {result.load_code}",
        str(result.path),
    ]
    return "\n".join(lines)
