"""SimSiam: visual representations from images without labels (Chen & He, 2021).

>>> run = simsiam.pretrain("photos/", epochs=100)      # a run folder; every flag of the verb is an argument
>>> encoder = simsiam.load(run)                        # backbone, eval mode: normalized images in, features h out
>>> h = encoder(encoder.transform(image))              # (1, encoder.dim)

>>> model = simsiam.build("simsiam", backbone="resnet18", image_size=32)
>>> model(x1, x2).loss.backward()                      # Algorithm 1, in a loop of your own

Names are loaded when they are first used, so importing the package costs nothing.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from simsiam.config.methods import METHODS, Method, Views
    from simsiam.config.recipes import Recipe
    from simsiam.detection.transfer import transfer
    from simsiam.embeddings.cluster import cluster
    from simsiam.embeddings.duplicates import duplicates
    from simsiam.embeddings.embed import embed
    from simsiam.embeddings.neighbors import neighbors
    from simsiam.embeddings.outliers import outliers
    from simsiam.embeddings.probe import probe
    from simsiam.errors import Stopped, UsageError, WorkFailed
    from simsiam.evaluation.evaluate import evaluate
    from simsiam.exports.export import export
    from simsiam.model.siamese import Siamese, build
    from simsiam.pages.compare import compare
    from simsiam.pages.report import report
    from simsiam.runs.convert import convert
    from simsiam.runs.encoder import load
    from simsiam.runs.run_folder import Run
    from simsiam.training.pretrain import pretrain, resume

_HOME = {
    "METHODS": "config.methods",
    "Method": "config.methods",
    "Recipe": "config.recipes",
    "Run": "runs.run_folder",
    "Siamese": "model.siamese",
    "Stopped": "errors",
    "UsageError": "errors",
    "Views": "config.methods",
    "WorkFailed": "errors",
    "build": "model.siamese",
    "cluster": "embeddings.cluster",
    "compare": "pages.compare",
    "convert": "runs.convert",
    "duplicates": "embeddings.duplicates",
    "embed": "embeddings.embed",
    "evaluate": "evaluation.evaluate",
    "export": "exports.export",
    "load": "runs.encoder",
    "neighbors": "embeddings.neighbors",
    "outliers": "embeddings.outliers",
    "pretrain": "training.pretrain",
    "probe": "embeddings.probe",
    "report": "pages.report",
    "resume": "training.pretrain",
    "transfer": "detection.transfer",
}
__all__ = [
    "METHODS", "Method", "Recipe", "Run", "Siamese", "Stopped", "UsageError", "Views", "WorkFailed",
    "build", "cluster", "compare", "convert", "duplicates", "embed", "evaluate", "export", "load", "neighbors",
    "outliers", "pretrain", "probe", "report", "resume", "transfer",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'simsiam' has no attribute {name!r}")
    return getattr(import_module(f"simsiam.{_HOME[name]}"), name)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        """Python binds a submodule to its name here when it is imported; `simsiam.pretrain` stays the function."""
        if name not in _HOME or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
