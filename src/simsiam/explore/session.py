"""What the server knows: the images, their place on the map, labels, predictions and decisions."""

import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import TypedDict

import numpy as np
import torch.nn.functional as F
from threadpoolctl import threadpool_limits

from simsiam.embeddings.copies.facts import FileFacts, file_facts
from simsiam.embeddings.copies.originals import Originals
from simsiam.embeddings.duplicates import THRESHOLD, find_duplicates
from simsiam.embeddings.neighbors import Query, embed_query, run_of
from simsiam.embeddings.outliers import neighbor_distances
from simsiam.embeddings.probe import ProbeResult, predict_labels, standardize
from simsiam.embeddings.table import Embeddings
from simsiam.errors import UsageError, WorkFailed, printable
from simsiam.explore.arrangement import arrange, find_clusters, first_positions
from simsiam.explore.originals import why_best
from simsiam.explore.path_table import PathTable
from simsiam.explore.queue import Teacher
from simsiam.utils.intervals import wilson_interval
from simsiam.utils.system import lower_thread_priority

MAX_OUTLIERS = 200
NUM_RESULTS = 60  # images that a search shows
KEEP, DROP = "keep", "drop"


class Progress(TypedDict):
    """How far labeling is."""

    labeled: int
    count: int
    low: float | None  # the interval of the estimated accuracy, in percent
    high: float | None


class Group(TypedDict):
    """A group of copies, or an outlier."""

    rows: list[int]  # the first one is the proposed one
    distances: list[float]
    notes: list[str]
    facts: list[FileFacts]
    reason: str


class Session:
    """One embedding that is being explored.

    Args:
        file: The embedding file.
        images: Its content.
        root: Where the originals are, if they have moved.
    """

    def __init__(self, file: Path, images: Embeddings, root: str | None = None):
        self.file, self.images = file, images
        places, paths = images.positions_by_name, images.paths

        def find_path(name: str) -> str:
            rows = places.get(name, ())
            return paths[rows[0]] if len(rows) == 1 else name

        self.labels = PathTable(file.with_suffix(".labels.csv"), "label", find_path)
        self.decisions = PathTable(file.with_suffix(".decisions.csv"), "decision", find_path)
        self.classes = sorted(set(self.labels.values.values()))  # in the order of their keys
        self.originals = Originals(images, file, root, ("explore", "--root"))
        self.xy = first_positions(images.vectors)
        # Two threads of scikit-learn's that limit the threads of BLAS for a while undo each other's
        # limits, and then OpenBLAS may hang.
        threadpool_limits(1, user_api="blas")
        self.layout = "principal components; a better map is being made"
        self.is_arranged = False
        self.clusters: np.ndarray | None = None
        self.result: ProbeResult | None = None
        self.queue: list[int] = []
        self.version = 0  # grows with every change of what the page shows
        self.fitted_version = -1  # the version of the labels that the predictions belong to
        self.problems: list[str] = []  # of the work in the background
        self._normalized = F.normalize(images.vectors, dim=1)
        self._copies: Future[list[Group]] | None = None
        self._copies_question = THRESHOLD, False
        self._outliers: Future[list[Group]] | None = None
        self._lock = Lock()
        self._fitter = ThreadPoolExecutor(1)
        # The map takes long: copies must not wait for it, and the browser needs a core meanwhile.
        self._worker = ThreadPoolExecutor(4, initializer=lower_thread_priority)
        self._prepared = self._worker.submit(self._prepare)
        self.fit()
        self._worker.submit(self._try, "the clusters", self._find_clusters)
        self._worker.submit(self._try, "the map", self._arrange)

    # --- work in the background ---

    def _try(self, what: str, work: Callable[[], None]) -> None:
        """Do work in a thread, and keep the reason if it fails."""
        try:
            work()
        except (UsageError, WorkFailed, ValueError, RuntimeError, MemoryError) as error:
            self.problems.append(f"{what} could not be made: {printable(str(error))}")
            print(self.problems[-1], file=sys.stderr)
        self.version += 1

    def _prepare(self) -> tuple[np.ndarray, Teacher]:
        return standardize(self.images), Teacher(self.images.vectors)

    def _find_clusters(self) -> None:
        self.clusters = find_clusters(self.images.vectors)

    def _arrange(self) -> None:
        self.layout, self.xy = arrange(self.images.vectors)
        self.is_arranged = True

    def fit(self) -> None:
        """Fit the predictions to the labels in the background; one fit waits at most."""
        self._fitter.submit(self._try, "the predictions", self._fit)

    def _fit(self) -> None:
        version = self.labels.version
        if version == self.fitted_version:
            return
        x, teacher = self._prepared.result()
        label_of = self.labeled_rows()
        enough = len(set(label_of.values())) > 1
        self.result = predict_labels(x, label_of) if enough else None
        confidence = self.result.confidence if self.result else None
        self.queue = teacher.choose(list(label_of), confidence)
        self.fitted_version = version

    # --- labels and decisions ---

    def rows_of(self, table: PathTable) -> dict[int, str]:
        """List labels or decisions by position; a name that several images have names none.

        Args:
            table: `labels` or `decisions`.
        """
        places = self.images.positions_by_name
        return {
            places[path][0]: text
            for path, text in list(table.values.items())
            if len(places.get(path, ())) == 1
        }

    def labeled_rows(self) -> dict[int, str]:
        """List the labels by position, as `simsiam probe` reads them."""
        return self.rows_of(self.labels)

    def _change(self, table: PathTable, texts: Mapping[int, str]) -> None:
        """Change labels or decisions; raise UsageError for those that share their path."""
        paths, places = self.images.paths, self.images.positions_by_name
        own = {paths[row]: text for row, text in texts.items() if len(places[paths[row]]) == 1}
        if own:
            table.change(own)
            self.version += 1
            if table is self.labels:
                self.fit()
        if shared := len(texts) - len(own):
            raise UsageError(
                f"{shared} of these {len(texts)} images share their path with another one and are "
                "left as they were, because labels and decisions are kept by path: give each image "
                "its own name and embed them again"
            )

    def label(self, rows: list[int], label: str, classes: Sequence[str] = ()) -> None:
        """Label images.

        Args:
            rows: Their positions.
            label: The label; "" removes it.
            classes: The classes in the order of their keys; others come after them.

        Raises:
            UsageError: Other images have the paths of some of these; the others are labeled.
        """
        known = [*classes, *self.classes, *sorted({*self.labels.values.values(), label} - {""})]
        self.classes = list(dict.fromkeys(known))
        self._change(self.labels, dict.fromkeys(rows, label))

    def decide(self, decisions: dict[int, str]) -> None:
        """Keep or drop images.

        Args:
            decisions: KEEP, DROP or "" of each image.

        Raises:
            UsageError: Another decision, or other images have the paths of some of these; the
                others are decided.
        """
        if wrong := set(decisions.values()) - {KEEP, DROP, ""}:
            raise UsageError(f"{printable(wrong.pop())} is no decision: keep, drop or nothing")
        self._change(self.decisions, decisions)

    def undo(self, what: PathTable) -> None:
        """Take back the last change of the labels or of the decisions.

        Args:
            what: `labels` or `decisions`.
        """
        what.undo()
        self._changed()

    def _changed(self) -> None:
        self.version += 1
        self.fit()

    def progress(self) -> Progress:
        """Say how many images are labeled, and how accurate the predictions probably are."""
        progress = Progress(
            labeled=len(self.labeled_rows()), count=len(self.images), low=None, high=None
        )
        if self.result and self.result.correct is not None:
            low, high = wilson_interval(self.result.correct, len(self.result.labels))
            progress |= {"low": 100 * low, "high": 100 * high}
        return progress

    # --- search ---

    def find_query(self, query: int | bytes) -> Query:
        """Find or embed a query.

        Args:
            query: The position of an image, or the content of an image file.

        Raises:
            UsageError: There is no such image, or the encoder is gone.
            WorkFailed: The file cannot be read.
        """
        if isinstance(query, bytes):
            name = "the dropped image"
            return embed_query(query, run_of(self.images, name), name)
        return Query(self.images.paths[query], self.images.vectors[query], query)

    def search(self, query: Query) -> tuple[list[int], np.ndarray]:
        """Find the images most similar to a query.

        Args:
            query: The query.

        Returns:
            The positions of the nearest images, without the query; and the cosine of each image,
            (N,).
        """
        cosine = self._normalized @ F.normalize(query.h, dim=0)
        order = cosine.sort(descending=True, stable=True).indices[: NUM_RESULTS + 1].tolist()
        return [row for row in order if row != query.position][:NUM_RESULTS], cosine.numpy()

    # --- clean up ---

    def find_copies(self, threshold: float, crops: bool = False) -> None:
        """Start to look for copies, by the rule of `simsiam duplicates`.

        Args:
            threshold: The largest distance of copies.
            crops: Whether to find crops and mirrored copies as well.
        """
        question = threshold, crops
        with self._lock:
            busy = self._copies is not None and not self._copies.done()
            if not busy and (self._copies is None or question != self._copies_question):
                self._copies_question = question
                self._copies = self._worker.submit(self._group_copies, threshold, crops)

    def _group_copies(self, threshold: float, crops: bool) -> list[Group]:
        groups = list[Group]()
        for group in find_duplicates(self.images, self.originals, threshold, crops):
            facts = [file_facts(self.originals, copy.position) for copy in group]
            groups.append(
                Group(
                    rows=[copy.position for copy in group],
                    distances=[round(copy.distance, 3) for copy in group],
                    notes=[copy.note for copy in group],
                    facts=facts,
                    reason=why_best(facts[0], facts[1:]),
                )
            )
        return groups

    def copies(self) -> list[Group] | None:
        """Return the groups of copies; None while they are being looked for.

        Raises:
            UsageError: They cannot be found.
        """
        return self._copies.result() if self._copies and self._copies.done() else None

    def outliers(self) -> list[Group] | None:
        """Return the images farthest from all others; None while they are being looked for."""
        with self._lock:
            if self._outliers is None:
                self._outliers = self._worker.submit(self._list_outliers)
        return self._outliers.result() if self._outliers.done() else None

    def _list_outliers(self) -> list[Group]:
        distance = neighbor_distances(self.images).numpy()
        rows = np.argsort(-distance, kind="stable")[:MAX_OUTLIERS].tolist()
        return [
            Group(
                rows=[row],
                distances=[round(float(distance[row]), 3)],
                notes=[""],
                facts=[file_facts(self.originals, row)],
                reason="",
            )
            for row in rows
        ]

    def close(self) -> None:
        """Stop the work in the background that has not begun."""
        self._fitter.shutdown(wait=False, cancel_futures=True)
        self._worker.shutdown(wait=False, cancel_futures=True)
