"""Cropped and mirrored copies: where an image lies in another one, and whether it is equal there.

SIFT features (Lowe, 2004) of all images are compared. If enough features of an image lie in another
one in the same arrangement, at another place and scale, the two are aligned and compared like
copies (`tile_distance`). A copy lies inside the other image as a whole: two frames of a pan, which
share a part, are no copies.
"""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from simsiam.embeddings.copies.distance import Detail, Match, brightness, tile_distance
from simsiam.embeddings.copies.originals import Originals
from simsiam.embeddings.search import nearest_rows
from simsiam.errors import UsageError
from simsiam.utils.progress_bar import progress_bar

LONGER_SIDE = (256, 384)  # pixels that features are computed at: at least, at most
NUM_FEATURES = 200  # of an image, the largest ones: small ones, such as letters, are everywhere
MIN_CONTRAST = 0.02  # of a feature; OpenCV's default of 0.04 leaves few in a radiograph
NUM_NEIGHBORS = 8  # features of other images that each feature is compared with
MIN_MATCHES = 8  # features of an image that must lie in the other one in the same arrangement
MAX_PLACES = 40  # of each image in others, those with the most features at their place
MAX_ERROR = 3.0  # pixels that a feature may lie beside its place
MIN_SCALE = 0.2  # of an image in another one; smaller parts are not looked for
MAX_TURN = 0.05  # radians
MARGIN = 0.03  # share of its width or height by which an image may stand out of the other one
CHUNK_SIZE = 128  # images that are read at a time
WHOLE = 0.97  # share of an image from which on a part of it is the whole


class Place(NamedTuple):
    """Where an image lies in another one.

    Attributes:
        container: Row of the larger picture.
        row: Row of the part of it.
        mirrored: Whether the part is mirrored.
        matrix: (3, 3), from x and y in the part to those in the larger picture, from 0 to 1.
        num_features: The number of features that say so.
    """

    container: int
    row: int
    mirrored: bool
    matrix: np.ndarray
    num_features: int

    @property
    def area(self) -> float:
        """The share of the larger picture that the part has."""
        return float(abs(np.linalg.det(self.matrix)))


def find_crops(
    originals: Originals, rows: Sequence[int], threshold: float
) -> dict[tuple[int, int], Match]:
    """Find images that are parts of others, mirrored or not.

    Args:
        originals: The images.
        rows: Rows of images to compare.
        threshold: The largest distance of copies.

    Returns:
        The match of each part, by the rows of the larger picture and of the part.

    Raises:
        UsageError: If OpenCV is not installed.
    """
    if find_spec("cv2") is None:
        raise UsageError('--crops needs OpenCV: pip install "simsiam[crops]"')
    matches = dict[tuple[int, int], Match]()
    by_part: dict[int, list[Place]] = {}
    for place in _find_places(originals, rows):
        if place.mirrored or place.area < WHOLE:
            by_part.setdefault(place.row, []).append(place)
    places = [
        place
        for found in by_part.values()
        for place in sorted(found, key=lambda place: -place.num_features)[:MAX_PLACES]
    ]
    with progress_bar("aligning", len(places)) as advance:
        for place in places:
            (whole, part), note = originals.read_or_thumbnails([place.container, place.row])
            distance = _aligned_distance(whole, part, place)
            if distance <= threshold:
                words = ["mirrored"] * place.mirrored + ["crop"] * (place.area < WHOLE)
                words += [note] * bool(note)
                matches[place.container, place.row] = Match(distance, ", ".join(words))
            advance(1)
    return matches


def _find_places(originals: Originals, rows: Sequence[int]) -> Iterator[Place]:
    """Yield where images lie in others, by their features."""
    sizes, features, mirrored = [], [], []
    with progress_bar("finding features", len(rows)) as advance:
        for n, row in enumerate(rows):
            if n % CHUNK_SIZE == 0:
                originals.read(rows[n : n + CHUNK_SIZE])  # in several threads
            gray = _gray(originals.read_or_thumbnails([row])[0][0])
            sizes.append(gray.shape[::-1])
            features.append(_features(gray))
            mirrored.append(_features(np.ascontiguousarray(gray[:, ::-1])))
            advance(1)
    points, owner, descriptors = _stack(features)
    for is_mirrored, queries in ((False, features), (True, mirrored)):
        query_points, query_owner, query_descriptors = _stack(queries)
        if not len(owner) or not len(query_owner):
            continue
        _, index = nearest_rows(query_descriptors, descriptors, NUM_NEIGHBORS)
        a = np.arange(len(query_owner)).repeat(index.shape[1])
        b = index.flatten().numpy()
        for (n, m), pairs in _likely_partners(query_owner[a], owner[b]).items():
            matrix, num_features = _fit(query_points[a[pairs]], points[b[pairs]])
            if num_features >= MIN_MATCHES:
                for part, container, shares in _whole_parts((n, m), is_mirrored, matrix, sizes):
                    yield Place(rows[container], rows[part], is_mirrored, shares, num_features)


def _likely_partners(a: np.ndarray, b: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
    """Find pairs of images with many similar features.

    Args:
        a: The image of a feature, int64 (N,).
        b: The image of a feature that is similar to it.

    Returns:
        For each pair of images in either order, the positions in a and b of its similar features.
    """
    position = np.flatnonzero(a != b)
    position = position[np.lexsort((b[position], a[position]))]
    changes = (np.diff(a[position]) != 0) | (np.diff(b[position]) != 0)
    groups = np.split(position, np.flatnonzero(changes) + 1)
    best: dict[tuple[int, int], np.ndarray] = {}
    for group in groups:
        n, m = (int(x[group[0]]) for x in (a, b)) if len(group) else (0, 0)
        if len(group) >= max(MIN_MATCHES, len(best.get((m, n), ()))):
            best.pop((m, n), None)
            best[n, m] = group
    return best


def _fit(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, int]:
    """Find the shift and scale, (3, 3), that takes most points of a to those of b.

    Returns:
        The matrix, and the number of points that it takes to their place; 0 if the scale is
        extreme, or it is no shift and scale.
    """
    import cv2

    matrix, inliers = cv2.estimateAffinePartial2D(a, b, ransacReprojThreshold=MAX_ERROR)
    if matrix is None:
        return np.eye(3), 0
    scale, turn = np.hypot(matrix[0, 0], matrix[1, 0]), np.arctan2(matrix[1, 0], matrix[0, 0])
    fits = MIN_SCALE <= scale <= 1 / MIN_SCALE and abs(turn) <= MAX_TURN
    return np.vstack([matrix, [0, 0, 1]]), len(np.unique(a[inliers[:, 0] > 0], axis=0)) * fits


def _whole_parts(
    pair: tuple[int, int],
    mirrored: bool,
    matrix: np.ndarray,
    sizes: Sequence[tuple[int, int]],
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Find out which image of a pair lies in the other one as a whole, or whether both do.

    Args:
        pair: Positions of the images.
        mirrored: Whether the first image was mirrored.
        matrix: From the pixels of the first image, mirrored or not, to those of the second one.
        sizes: Width and height of all images.

    Yields:
        The positions of the part and of the larger picture, and the matrix of `Place`.
    """
    n, m = pair
    inverse = np.linalg.inv(matrix)
    if mirrored:  # mirror the second image in place of the first one
        inverse = _mirror(sizes[n]) @ inverse @ _mirror(sizes[m])
    for part, container, pixels in ((n, m, matrix), (m, n, inverse)):
        shares = _to_shares(sizes[container]) @ pixels @ np.linalg.inv(_to_shares(sizes[part]))
        corners = np.array([[0, 0, 1], [1, 0, 1], [0, 1, 1], [1, 1, 1]]) @ shares[:2].T
        if corners.min() >= -MARGIN and corners.max() <= 1 + MARGIN:
            yield part, container, shares


def _mirror(size: tuple[int, int]) -> np.ndarray:
    return np.array([[-1, 0, size[0] - 1], [0, 1, 0], [0, 0, 1]])


def _to_shares(size: tuple[int, int]) -> np.ndarray:
    """The matrix from centers of pixels to shares of width and height, from 0 to 1."""
    return np.array([[1 / size[0], 0, 0.5 / size[0]], [0, 1 / size[1], 0.5 / size[1]], [0, 0, 1]])


def _gray(detail: Detail) -> np.ndarray:
    """Make the image that features are found in, uint8 (h, w), in the proportions of the image."""
    luma, alpha = brightness(detail.pixels.float())
    visible = luma if alpha.amin() == 255 else (luma + 255 - alpha) / 2  # white where transparent
    longer = max(detail.height, detail.width)
    scale = min(max(longer, LONGER_SIDE[0]), LONGER_SIDE[1]) / longer
    sides = [max(1, round(side * scale)) for side in (detail.height, detail.width)]
    return TF.resize(visible[None].byte(), sides, antialias=True)[0].numpy()


def _features(gray: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find features: x and y in pixels, float32 (n, 2), and descriptors, float32 (n, 128)."""
    import cv2

    sift = cv2.SIFT_create(contrastThreshold=MIN_CONTRAST)
    points = sorted(sift.detect(gray, None), key=lambda point: -point.size)[:NUM_FEATURES]
    if not points:
        return np.zeros((0, 2), np.float32), np.zeros((0, 128), np.float32)
    points, descriptors = sift.compute(gray, points)
    return np.array([point.pt for point in points], np.float32), descriptors


def _stack(
    features: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """Join the features of all images: their places, the positions of their images, descriptors."""
    points, descriptors = (np.concatenate(arrays) for arrays in zip(*features, strict=True))
    owner = np.repeat(np.arange(len(features)), [len(places) for places, _ in features])
    return points, owner, torch.from_numpy(descriptors)


def _aligned_distance(container: Detail, part: Detail, place: Place) -> float:
    """Compute the distance of an image to the place where it lies in another one."""
    import cv2

    extent = np.hypot(*place.matrix[:2, :2])  # width and height of the part, as shares
    sides = [  # at the lower one of the two resolutions
        max(1, round(min(own, share * whole)))
        for own, share, whole in zip(
            part.pixels.shape[1:], extent[::-1], container.pixels.shape[1:]
        )
    ]
    b = TF.resize(part.pixels.flip(2) if place.mirrored else part.pixels, sides, antialias=True)
    scaled = [max(1, round(side / share)) for side, share in zip(sides, extent[::-1])]
    whole = TF.resize(container.pixels, scaled, antialias=True).numpy()
    matrix = (
        np.linalg.inv(_to_shares((scaled[1], scaled[0])))
        @ place.matrix
        @ _to_shares((sides[1], sides[0]))
    )

    def cut(matrix: np.ndarray) -> Tensor:
        options = {"flags": cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP}
        options |= {"dsize": sides[::-1], "borderMode": cv2.BORDER_REPLICATE}
        return torch.from_numpy(
            np.stack([cv2.warpAffine(channel, matrix[:2], **options) for channel in whole])
        )

    a = cut(matrix)
    grays = [brightness(x.float())[0].numpy() for x in (b, a)]
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 30, 1e-4)
    try:  # move it by the fractions of a pixel that the features leave open
        start = np.eye(2, 3, dtype=np.float32)
        _, finer = cv2.findTransformECC(*grays, start, cv2.MOTION_AFFINE, criteria, None, 5)
        a = cut(matrix @ np.vstack([finer, [0, 0, 1]]))
    except cv2.error:  # it does not converge: the images differ, which the distance will say
        pass
    return tile_distance(a, b)
