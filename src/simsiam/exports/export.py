"""simsiam export: a run's backbone in the files that other programs load.

An export is a folder that appears whole or not at all: the weights or the graph, preprocessing.json, and for the hub a
model card. It is loaded again by the format's own library, and kept only where features agree with eager ones.
"""

import json
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models

from simsiam.config.recipes import ResolvedRecipe, default_stem
from simsiam.errors import UsageError, WorkFailed, unknown_name
from simsiam.exports import detectron2
from simsiam.exports.model_card import model_card
from simsiam.model.backbones import RESNETS, TIMM_PREFIX, remove_classifier
from simsiam.runs.encoder import build_backbone, eval_transform, load
from simsiam.runs.recipe_file import write_recipe
from simsiam.runs.run_folder import Run
from simsiam.runs.weight_files import save_weights
from simsiam.utils.files import atomic_folder

TOLERANCE = 1e-5  # of features: absolute, or relative to the largest one where that is above 1
TEST_BATCH_SIZES = (1, 3)  # images that features are compared on: a graph must take any number

Network = Callable[[Tensor], Tensor]


class ExportResult(NamedTuple):
    path: Path
    delta: float  # largest difference between a feature here and there
    load_code: str  # the line that loads it


def export(
    run: str | os.PathLike[str],
    *,
    format: str,
    out: str | os.PathLike[str] | None = None,
    license: str | None = None,
    push: str | None = None,
) -> ExportResult:
    """Write the backbone in one of FORMATS to the folder `out`, by default RUN/exports/FORMAT.

    `license` of the weights goes on the model card. `push`, "owner/name", uploads a huggingface export; without it
    nothing leaves this machine. Raises UsageError for what cannot be exported so, WorkFailed where features disagree.
    """
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    if (push or license) and format != "huggingface":
        raise UsageError(f"push and license belong to format huggingface, not to {format}")
    write, reload, packages, how = FORMATS[format]
    for package in (*packages, *(["huggingface_hub"] if push else [])):
        require_package(package, format)
    network, folder = load(run), Run(run)
    path = Path(out) if out else folder.path / "exports" / format
    if path.exists():
        raise UsageError(
            f"{path} exists and is not written over: delete it, or choose another --out"
        )
    with atomic_folder(path) as part:
        write(network, folder, part)
        (part / "preprocessing.json").write_text(
            json.dumps(preprocessing_config(folder.recipe), indent=2) + "\n"
        )
        if format == "huggingface":
            (part / "README.md").write_text(model_card(folder, license), encoding="utf-8")
        delta = max_difference(network, reload(part, folder.recipe), folder.recipe)
    if push:
        upload_to_hub(path, push)
    return ExportResult(
        path,
        delta,
        how.format(path=path, backbone=folder.recipe.backbone.removeprefix(TIMM_PREFIX)),
    )


def require_package(package: str, format: str) -> None:
    try:
        import_module(package)
    except ImportError:
        raise UsageError(
            f'format {format} needs {package}: pip install "simsiam[{EXTRAS[package]}]"'
        ) from None


def preprocessing_config(recipe: ResolvedRecipe) -> dict[str, Any]:
    """What is done to an image before the network sees it."""
    transform = eval_transform(recipe)
    return {
        "resize_shorter_side": transform.resize, "center_crop": transform.size, "antialias": True,
        "interpolation": transform.interpolation, "channels": recipe.channels, "range": [0, 1],
        "mean": list(transform.mean), "std": list(transform.std), "layout": "NCHW, float32",
    }  # fmt: skip


def max_difference(eager: Network, exported: Network, recipe: ResolvedRecipe) -> float:
    """The largest |Δ| between features of the same images. Raises WorkFailed above TOLERANCE."""
    largest = 0.0
    for n in TEST_BATCH_SIZES:
        shape = (n, recipe.channels, recipe.image_size, recipe.image_size)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(n))
        with torch.no_grad():
            h, other = eager(x), exported(x)
        if h.shape != other.shape:
            raise WorkFailed(
                f"not kept: the exported file gives features {tuple(other.shape)}, not {tuple(h.shape)}"
            )
        delta = (h - other).abs().max().item()
        if not delta <= TOLERANCE * max(1.0, h.abs().max().item()):  # nan as well
            raise WorkFailed(
                f"not kept: features of the exported file are off by {delta:.2g}, more than {TOLERANCE:g}"
            )
        largest = max(largest, delta)
    return largest


# --- the formats ------------------------------------------------------------------------------------------------------


def write_safetensors(network: nn.Module, run: Run, folder: Path) -> None:
    about = {
        "backbone": run.recipe.backbone,
        "preprocessing": json.dumps(preprocessing_config(run.recipe)),
    }
    save_weights(contiguous_state_dict(network), folder / "backbone.safetensors", about)


def reload_safetensors(folder: Path, recipe: ResolvedRecipe) -> Network:
    network = build_backbone(recipe).eval()
    network.load_state_dict(load_file(folder / "backbone.safetensors"))
    return network


def write_torchvision(network: nn.Module, run: Run, folder: Path) -> None:
    recipe = run.recipe
    if recipe.backbone not in models.list_models(module=models) or not is_standard_backbone(recipe):
        raise UsageError(
            f"torchvision has no {describe_backbone(recipe)}: take safetensors, onnx or torch_export"
        )
    with open(folder / "backbone.pth", "wb") as file:
        torch.save(contiguous_state_dict(network), file)


def reload_torchvision(folder: Path, recipe: ResolvedRecipe) -> Network:
    model = models.get_model(recipe.backbone, weights=None)
    network = remove_classifier(model, recipe.backbone, recipe.image_size).eval()
    network.load_state_dict(torch.load(folder / "backbone.pth", weights_only=True))
    return network


def write_timm(network: nn.Module, run: Run, folder: Path) -> None:
    """The layout that timm reads from the hub and from disk alike."""
    recipe, transform = run.recipe, eval_transform(run.recipe)
    if not is_in_timm(recipe):
        raise UsageError(
            f"timm has no {describe_backbone(recipe)}: take safetensors, onnx or torch_export"
        )
    arguments = {"in_chans": recipe.channels} if recipe.channels != 3 else {}
    fixed = bool(getattr(network, "pretrained_cfg", {}).get("fixed_input_size"))
    config = {
        "architecture": recipe.backbone.removeprefix(TIMM_PREFIX),
        "num_classes": 0,
        "num_features": network.dim,
        "model_args": arguments | ({"img_size": transform.size} if fixed else {}),
        "pretrained_cfg": {
            "input_size": [recipe.channels, transform.size, transform.size],
            "interpolation": transform.interpolation,
            "crop_pct": transform.size / transform.resize,
            "crop_mode": "center",
            "mean": list(transform.mean),
            "std": list(transform.std),
            "fixed_input_size": fixed,
            "num_classes": 0,
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_weights(contiguous_state_dict(network), folder / "model.safetensors", {"format": "pt"})


def reload_timm(folder: Path, recipe: ResolvedRecipe) -> Network:
    import timm

    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    known = timm.data.resolve_model_data_config(network)
    transform = eval_transform(recipe)
    if (known["input_size"][1], tuple(known["mean"]), tuple(known["std"])) != (
        transform.size,
        transform.mean,
        transform.std,
    ):
        raise WorkFailed(f"not kept: timm would prepare images in another way, {known}")
    return network


def write_detectron2(network: nn.Module, run: Run, folder: Path) -> None:
    """Weights that its checkpointer loads, and what a config must say for them to be used as they were trained."""
    recipe = run.recipe
    depth = next((n for n in detectron2.RESNET_DEPTHS if recipe.backbone == f"resnet{n}"), None)
    if depth is None or not is_standard_backbone(recipe):
        raise UsageError(
            f"detectron2 has no {describe_backbone(recipe)}: take safetensors, onnx or torch_export"
        )
    (folder / "backbone.pkl").write_bytes(detectron2.pickle_checkpoint(network.state_dict()))
    config = yaml.safe_dump(
        detectron2.config_overrides(depth, eval_transform(recipe)), sort_keys=False
    )
    (folder / "config.yaml").write_text(config)


def reload_detectron2(folder: Path, recipe: ResolvedRecipe) -> Network:
    """By the library where it is installed, else from its names and settings."""
    weights, config, transform = (
        folder / "backbone.pkl",
        folder / "config.yaml",
        eval_transform(recipe),
    )
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (transform.mean, transform.std))
    model, about = pickle.loads(weights.read_bytes())["model"], yaml.safe_load(config.read_text())
    installed = find_spec("detectron2") is not None
    network = (
        detectron2.load_with_detectron2(weights, config)
        if installed
        else partial(detectron2.compute_features, model, about)
    )
    return lambda x: network(detectron2.normalize_pixels(255 * (x * std + mean), about))


def write_onnx(network: nn.Module, run: Run, folder: Path) -> None:
    with suppress_warnings():
        torch.onnx.export(
            network,
            (example_input(run.recipe),),
            folder / "backbone.onnx",
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )


def reload_onnx(folder: Path, recipe: ResolvedRecipe) -> Network:
    import onnx
    import onnxruntime

    onnx.checker.check_model(folder / "backbone.onnx")
    session = onnxruntime.InferenceSession(
        folder / "backbone.onnx", providers=["CPUExecutionProvider"]
    )
    return lambda x: torch.from_numpy(session.run(["features"], {"images": x.numpy()})[0])


def write_torch_export(network: nn.Module, run: Run, folder: Path) -> None:
    about = {"preprocessing.json": json.dumps(preprocessing_config(run.recipe))}
    with suppress_warnings():
        program = torch.export.export(
            network, (example_input(run.recipe),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        torch.export.save(program, folder / "backbone.pt2", extra_files=about)


def reload_torch_export(folder: Path, recipe: ResolvedRecipe) -> Network:
    with suppress_warnings():
        return torch.export.load(folder / "backbone.pt2").module()


def write_huggingface(network: nn.Module, run: Run, folder: Path) -> None:
    """A folder that `simsiam.load` and --init read, and timm where it knows the network."""
    write_recipe(folder, run.recipe)
    write_safetensors(network, run, folder)
    if is_in_timm(run.recipe):
        write_timm(network, run, folder)


def reload_huggingface(folder: Path, recipe: ResolvedRecipe) -> Network:
    ours = load(folder)
    if is_in_timm(recipe):
        max_difference(ours, reload_timm(folder, recipe), recipe)
    return ours


class Format(NamedTuple):
    write: Callable[[nn.Module, Run, Path], None]
    reload: Callable[[Path, ResolvedRecipe], Network]
    packages: tuple[str, ...]  # beyond our own dependencies
    load_code: str  # the line that loads it


FORMATS = {
    "safetensors": Format(
        write_safetensors, reload_safetensors, (), 'safetensors.torch.load_file("{path}/backbone.safetensors")'
    ),
    "torchvision": Format(
        write_torchvision, reload_torchvision, (),
        'torchvision.models.{backbone}().load_state_dict(torch.load("{path}/backbone.pth"), strict=False)',
    ),
    "timm": Format(write_timm, reload_timm, (), 'timm.create_model("local-dir:{path}", pretrained=True)'),
    "detectron2": Format(
        write_detectron2, reload_detectron2, (),
        'cfg.merge_from_file("{path}/config.yaml"); cfg.MODEL.WEIGHTS = "{path}/backbone.pkl"',
    ),
    "onnx": Format(
        write_onnx, reload_onnx, ("onnx", "onnxscript", "onnxruntime"),
        'onnxruntime.InferenceSession("{path}/backbone.onnx")',
    ),
    "torch_export": Format(
        write_torch_export, reload_torch_export, (), 'torch.export.load("{path}/backbone.pt2").module()'
    ),
    "huggingface": Format(write_huggingface, reload_huggingface, (), 'simsiam.load("{path}")'),
}  # fmt: skip
EXTRAS = {"onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx", "huggingface_hub": "hub"}


def is_standard_backbone(recipe: ResolvedRecipe) -> bool:
    """Whether the network is as published: a ResNet may be narrower here, or have the stem for small images."""
    stem = recipe.stem or default_stem(recipe.image_size)
    return recipe.backbone not in RESNETS or (recipe.width, stem, recipe.channels) == (
        64,
        "large",
        3,
    )


def is_in_timm(recipe: ResolvedRecipe) -> bool:
    """timm's ResNets are torchvision's, parameter by parameter."""
    import timm

    ours = (
        recipe.backbone in RESNETS
        and recipe.backbone in timm.list_models()
        and is_standard_backbone(recipe)
    )
    return ours or recipe.backbone.startswith(TIMM_PREFIX)


def describe_backbone(recipe: ResolvedRecipe) -> str:
    stem = recipe.stem or default_stem(recipe.image_size)
    return f"{recipe.backbone}" + f" of width {recipe.width} with a {stem} stem" * (
        recipe.backbone in RESNETS
    )


def contiguous_state_dict(network: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()
    }


def example_input(recipe: ResolvedRecipe) -> Tensor:
    return torch.zeros(2, recipe.channels, recipe.image_size, recipe.image_size)


@contextmanager
def suppress_warnings() -> Iterator[None]:
    """Exporters warn of their own internals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def upload_to_hub(folder: Path, name: str) -> None:
    """To the hub, as a new private repository or as a commit to one of one's own. Raises WorkFailed."""
    import huggingface_hub

    try:
        hub = huggingface_hub.HfApi()
        hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # its own, its HTTP library's, and the system's
        raise WorkFailed(
            f"{folder} is written, but not pushed to {name}: {' '.join(str(error).split())}"
        ) from None


def format_export(result: ExportResult) -> str:
    return f"largest difference to eager features: {result.delta:.2g}\nload it by: {result.load_code}\n{result.path}"
