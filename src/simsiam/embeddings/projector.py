"""`embed --format tensorboard`: a folder that TensorBoard's projector shows, with thumbnails."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from simsiam.data.parquet_files import read_parquet
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
