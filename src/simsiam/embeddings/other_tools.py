"""`embed --format`: folders that TensorBoard's projector and FiftyOne load."""

import base64
import io
import json
import math
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from simsiam.data.parquet_files import read_parquet
from simsiam.embeddings.copies.originals import Originals
from simsiam.embeddings.table import Embeddings, table_to_embeddings
from simsiam.errors import printable
from simsiam.utils.files import atomic_folder

MAX_SPRITE = 8192  # pixels a side that WebGL takes
SPRITE_SIDE = 64  # pixels a side of a thumbnail, if all of them fit


def write_projector(parts: Sequence[Path], path: Path, metadata: str) -> None:
    """Write a folder for `tensorboard --logdir FOLDER`, page Projector.

    Args:
        parts: The files of the parts, in order.
        path: The folder.
        metadata: What `embed` stores in its own format; not used.
    """
    from google.protobuf.text_format import MessageToString
    from tensorboard.plugins.projector import ProjectorConfig

    images = table_to_embeddings(pa.concat_tables([read_parquet(part) for part in parts]))
    side = min(SPRITE_SIDE, MAX_SPRITE // math.ceil(math.sqrt(len(images))))
    config = ProjectorConfig()
    entry = config.embeddings.add()
    entry.tensor_name, entry.tensor_path = "features", "tensors.tsv"
    entry.metadata_path, entry.sprite.image_path = "metadata.tsv", "sprite.png"
    entry.sprite.single_image_dim.extend([side, side])
    with atomic_folder(path) as folder:
        np.savetxt(folder / "tensors.tsv", images.vectors.numpy(), "%.6g", "\t")
        lines = [
            f"{printable(p)}\t{printable(images.label(i))}" for i, p in enumerate(images.paths)
        ]
        text = "\n".join(["path\tlabel", *lines]) + "\n"
        (folder / "metadata.tsv").write_text(text, encoding="utf-8")
        make_sprite(images, side).save(folder / "sprite.png")
        config_file = folder / "projector_config.pbtxt"
        config_file.write_text(MessageToString(config), encoding="utf-8")


# The fields of a sample, as FiftyOne's format LegacyFiftyOneDataset names their types.
FIFTYONE_FIELDS = {
    "filepath": "fiftyone.core.fields.StringField",
    "tags": "fiftyone.core.fields.ListField(fiftyone.core.fields.StringField)",
    "path": "fiftyone.core.fields.StringField",
    "features": "fiftyone.core.fields.VectorField",
    "label": "fiftyone.core.fields.EmbeddedDocumentField(fiftyone.core.labels.Classification)",
}


def write_fiftyone(parts: Sequence[Path], path: Path, metadata: str) -> None:
    """Write a folder that FiftyOne loads, as its type LegacyFiftyOneDataset.

    A sample names the original, if it is a file, else its thumbnail, which is in the folder.

    Args:
        parts: The files of the parts, in order.
        path: The folder.
        metadata: What `embed` stores in its own format: it says where the originals are.
    """
    table = pa.concat_tables([read_parquet(part) for part in parts])
    images = table_to_embeddings(table.replace_schema_metadata({"simsiam": metadata}))
    originals = Originals(images, path)
    with atomic_folder(path) as folder:
        (folder / "data").mkdir()
        samples = []
        for i, name in enumerate(images.paths):
            file = _find_file(originals, i)
            if file is None:
                file = f"data/{i:09}.jpg"
                Image.fromarray(images.thumbnail(i)).save(folder / file, quality=95)
            sample: dict[str, Any] = {"filepath": file, "tags": [], "path": printable(name)}
            sample["features"] = _encode_vector(images.vectors[i].numpy())
            if images.labels is not None and (label := images.labels[i]) is not None:
                sample["label"] = {"_cls": "Classification", "label": printable(label)}
            samples.append(sample)
        description = {
            "name": path.name, "media_type": "image", "sample_fields": FIFTYONE_FIELDS, "info": {},
        }  # fmt: skip
        for file, content in (("metadata", description), ("samples", {"samples": samples})):
            (folder / f"{file}.json").write_text(json.dumps(content), encoding="utf-8")
    if copies := sum(sample["filepath"].startswith("data/") for sample in samples):
        text = f"{copies:,} of {len(images):,} images are no files of their own: "
        print(f"{text}their thumbnails are in {printable(str(path))}/data", file=sys.stderr)


def _find_file(originals: Originals, row: int) -> str | None:
    """The absolute path of the image of a row, if it is a file whose name is text."""
    if (found := originals.find_file(row)) is None:
        return None
    files, position = found
    file = str(Path(files.file(position)).absolute())
    return file if file == printable(file) else None


def _encode_vector(vector: np.ndarray) -> dict[str, object]:
    """Encode an array as FiftyOne stores it: the format .npy, compressed, in MongoDB's JSON."""
    file = io.BytesIO()
    np.save(file, vector)
    text = base64.b64encode(zlib.compress(file.getvalue())).decode()
    return {"$binary": {"base64": text, "subType": "00"}}


def make_sprite(images: Embeddings, side: int) -> Image.Image:
    """Put all thumbnails into one picture, in rows.

    Args:
        images: The images, with thumbnails.
        side: Pixels a side of each thumbnail.

    Returns:
        A square picture.
    """
    columns = math.ceil(math.sqrt(len(images)))
    sprite = Image.new("RGB", (columns * side, columns * side))
    for i in range(len(images)):
        thumbnail = Image.fromarray(images.thumbnail(i)).resize((side, side))
        sprite.paste(thumbnail, (i % columns * side, i // columns * side))
    return sprite
