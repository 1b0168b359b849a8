"""Measure what a catalog of many images costs before an image is read.

    python benchmarks/catalog.py N [N ...]

Writes the catalog of N images that do not exist, in tar files of 10,000 images, and opens it like
any other. Prints its size on disk, the time to open it and to find the images of a batch, and its
memory.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from simsiam.config.recipes import Recipe
from simsiam.data.batches import batch_indices
from simsiam.sources import catalog
from simsiam.sources.catalog import CATALOG_SCHEMA, Catalog, ShardFile

EACH, SHARD = 110_000, 10_000  # bytes of an image, images of a tar


def memory() -> float:
    """Return the MB of this process that are not mapped from a file."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1000


def main(count: int) -> dict[str, float]:
    shards = count // SHARD
    files = [ShardFile(f"train-{n:06}.tar", SHARD * EACH, "", "train") for n in range(shards)]
    places = np.arange(SHARD) * EACH, np.full(SHARD, EACH - 2048), np.full(SHARD, -1)
    keys = [f"train/n{i // 1300:08}/n{i // 1300:08}_{i:06}.JPEG".encode() for i in range(SHARD)]
    batch = pa.record_batch(
        [pa.array(keys, pa.large_binary()), *map(pa.array, places)], CATALOG_SCHEMA
    )
    with tempfile.TemporaryDirectory() as folder:
        path, key = Path(folder) / "catalog.arrow", [catalog.CATALOG_VERSION, *map(list, files)]
        catalog._write_catalog(path, Catalog(files, (batch for _ in files), (), (), None), key)
        before, start = memory(), time.perf_counter()
        cached = catalog._read_cached(path, files, key)
        assert cached is not None
        images, _ = cached.load_split("train")
        opened = time.perf_counter() - start
        recipe = Recipe().replace(batch_size=512)
        times = []
        for step in (0, 1, 2, 3, count // 512 // 2):
            start = time.perf_counter()
            index = batch_indices(step, recipe, images)
            times.append(time.perf_counter() - start)
        names = [images.keys[i] for i in index[:8]]
        assert len(set(names)) <= 8
        return {
            "images": count,
            "disk_bytes_each": round(path.stat().st_size / count, 1),
            "opened_seconds": round(opened, 2),
            "first_batch_seconds": round(times[0], 2),
            "later_batch_milliseconds": round(1000 * min(times[1:]), 1),
            "memory_bytes_each": round((memory() - before) * 1e6 / count, 2),
            "blocks": len(images.blocks or ()),
        }


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(json.dumps([main(int(count)) for count in sys.argv[1:]], indent=1))
