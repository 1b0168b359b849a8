"""Format `torch_export`: a program of torch.export, for any number of images."""

import json
from pathlib import Path

import torch
from torch import nn

from simsiam.config.recipes import ResolvedRecipe
from simsiam.exports.format import (
    Format,
    Network,
    example_input,
    suppress_warnings,
)
from simsiam.runs.preprocessing import preprocessing_config
from simsiam.runs.run_folder import Run

FILE_NAME = "backbone.pt2"


def write(network: nn.Module, run: Run, folder: Path) -> None:
    """Write backbone.pt2, with preprocessing.json inside.

    Args:
        network: The backbone.
        run: Its run.
        folder: Where to write.
    """
    files = {"preprocessing.json": json.dumps(preprocessing_config(run.recipe))}
    shapes = ({0: torch.export.Dim("batch")},)
    with suppress_warnings():
        program = torch.export.export(network, (example_input(run.recipe),), dynamic_shapes=shapes)
        torch.export.save(program, folder / FILE_NAME, extra_files=files)


def reload(folder: Path, recipe: ResolvedRecipe) -> Network:
    """Load the program.

    Args:
        folder: What `write` wrote.
        recipe: The recipe of the run.
    """
    with suppress_warnings():
        return torch.export.load(folder / FILE_NAME).module()


FORMAT = Format(write, reload, f'torch.export.load("{{path}}/{FILE_NAME}").module()')
