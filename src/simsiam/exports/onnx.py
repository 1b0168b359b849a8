"""Format `onnx`: the graph of the network, for any number of images."""

import os
from pathlib import Path

import torch
from torch import nn

from simsiam.config.recipes import ResolvedRecipe
from simsiam.exports.format import Format, Network, example_input, suppress_warnings
from simsiam.runs.run_folder import Run

FILE_NAME = "backbone.onnx"
# ONNX Runtime sends data about its use to its maker, and reads this once, when it is imported.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"


def write(network: nn.Module, run: Run, folder: Path) -> None:
    """Write backbone.onnx.

    Args:
        network: The backbone.
        run: Its run.
        folder: Where to write.
    """
    with suppress_warnings():
        torch.onnx.export(
            network,
            (example_input(run.recipe),),
            folder / FILE_NAME,
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )


def reload(folder: Path, recipe: ResolvedRecipe) -> Network:
    """Load the graph with ONNX Runtime on the CPU.

    Args:
        folder: What `write` wrote.
        recipe: The recipe of the run.
    """
    import onnx
    import onnxruntime

    path = folder / FILE_NAME
    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["features"], {"images": x.numpy()})[0])


FORMAT = Format(
    write,
    reload,
    f'onnxruntime.InferenceSession("{{path}}/{FILE_NAME}")',
    packages=("onnx", "onnxscript", "onnxruntime"),
    extra="onnx",
)
