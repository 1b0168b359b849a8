"""SimSiam: visual representations from images without labels (Chen & He, 2021).

>>> run = simsiam.pretrain("photos/", epochs=100)      # returns the run folder
>>> encoder = simsiam.load(run)                        # the backbone: normalized images to features
>>> h = encoder(encoder.transform("photo.jpg"))        # (1, encoder.dim); or a PIL image, an array

A training loop of your own takes the same parts:

>>> model = simsiam.build("simsiam", backbone="resnet18", image_size=32)
>>> x1, x2 = simsiam.make_views(images, model.method.views, view_count=2, ...)
>>> output = model(x1, x2)                             # Algorithm 1
>>> output.loss.backward()
>>> optimizer.step()
>>> model.after_step(output)

Every verb of the command line that works on runs or sources is a function here, and its flags are
keyword arguments. Names are loaded when they are first used, so importing the package is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING

try:
    from simsiam._version import __version__  # the build writes this file, from the tag
except ModuleNotFoundError:  # a checkout that was never built or installed
    __version__ = "0.0.dev0"

if TYPE_CHECKING:
    from simsiam.config.methods import METHODS as METHODS
    from simsiam.config.methods import Method as Method
    from simsiam.config.methods import Views as Views
    from simsiam.config.recipes import Recipe as Recipe
    from simsiam.data.views import make_views as make_views
    from simsiam.detection.transfer import transfer as transfer
    from simsiam.embeddings.cluster import cluster as cluster
    from simsiam.embeddings.duplicates import duplicates as duplicates
    from simsiam.embeddings.embed import embed as embed
    from simsiam.embeddings.neighbors import neighbors as neighbors
    from simsiam.embeddings.outliers import outliers as outliers
    from simsiam.embeddings.probe import probe as probe
    from simsiam.embeddings.search_source import search as search
    from simsiam.errors import Stopped as Stopped
    from simsiam.errors import UsageError as UsageError
    from simsiam.errors import WorkFailed as WorkFailed
    from simsiam.evaluation.evaluate import evaluate as evaluate
    from simsiam.exports.export import export as export
    from simsiam.model.losses import CRITERIA as CRITERIA
    from simsiam.model.losses import Criterion as Criterion
    from simsiam.model.losses import negative_cosine as negative_cosine
    from simsiam.model.siamese import Siamese as Siamese
    from simsiam.model.siamese import build as build
    from simsiam.model.targets import TARGETS as TARGETS
    from simsiam.pages.compare import compare as compare
    from simsiam.pages.preview import preview as preview
    from simsiam.pages.report import report as report
    from simsiam.runs.checkpoints.convert import convert as convert
    from simsiam.runs.run_folder import Run as Run
    from simsiam.runs.weights import load as load
    from simsiam.training.adaptation.adapt import adapt as adapt
    from simsiam.training.inspect import inspect as inspect
    from simsiam.training.launch import pretrain as pretrain
    from simsiam.training.launch import resume as resume
    from simsiam.training.plan import plan as plan

_MODULES = {
    "CRITERIA": "model.losses",
    "Criterion": "model.losses",
    "METHODS": "config.methods",
    "Method": "config.methods",
    "Recipe": "config.recipes",
    "Run": "runs.run_folder",
    "Siamese": "model.siamese",
    "Stopped": "errors",
    "TARGETS": "model.targets",
    "UsageError": "errors",
    "Views": "config.methods",
    "WorkFailed": "errors",
    "adapt": "training.adaptation.adapt",
    "build": "model.siamese",
    "cluster": "embeddings.cluster",
    "compare": "pages.compare",
    "convert": "runs.checkpoints.convert",
    "duplicates": "embeddings.duplicates",
    "embed": "embeddings.embed",
    "evaluate": "evaluation.evaluate",
    "export": "exports.export",
    "inspect": "training.inspect",
    "load": "runs.weights",
    "make_views": "data.views",
    "negative_cosine": "model.losses",
    "neighbors": "embeddings.neighbors",
    "outliers": "embeddings.outliers",
    "plan": "training.plan",
    "pretrain": "training.launch",
    "preview": "pages.preview",
    "probe": "embeddings.probe",
    "report": "pages.report",
    "resume": "training.launch",
    "search": "embeddings.search_source",
    "transfer": "detection.transfer",
}
__all__ = [
    "CRITERIA", "METHODS", "TARGETS", "Criterion", "Method", "Recipe", "Run", "Siamese",
    "Stopped", "UsageError", "Views", "WorkFailed", "adapt", "build", "cluster", "compare",
    "convert", "duplicates", "embed", "evaluate", "export", "inspect", "load", "make_views",
    "negative_cosine", "neighbors", "outliers", "plan", "pretrain", "preview", "probe",
    "report", "resume", "search", "transfer",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'simsiam' has no attribute {name!r}")
    return getattr(import_module(f"simsiam.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - {"TYPE_CHECKING", "import_module"})
