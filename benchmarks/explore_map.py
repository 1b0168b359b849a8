"""How fast the map of `explore` is with 100,000 synthetic points, in Chromium without a GPU.

    python benchmarks/explore_map.py [--images 100000]

Prints the seconds from opening the address to the first drawn points; the frames a second while the
map is dragged; and how much time of a core the browser takes for a frame, which other work on the
machine does not change much.
"""

import argparse
import contextlib
import io
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from playwright.sync_api import sync_playwright

FLAGS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
DRAG = """async () => {
  const canvas = document.querySelector(".overlay"), box = canvas.getBoundingClientRect();
  const send = (type, x) => canvas.dispatchEvent(new PointerEvent(type, {
    clientX: box.left + x, clientY: box.top + 200, pointerId: 1, bubbles: true }));
  canvas.setPointerCapture = () => {};
  send("pointerdown", 100);
  const before = window.explore.map.frames, start = performance.now();
  let step = 0;
  while (performance.now() - start < 3000) {
    send("pointermove", 100 + 100 * Math.sin(step++ / 20));
    await new Promise(requestAnimationFrame);
  }
  send("pointerup", 100);
  return (window.explore.map.frames - before) / (performance.now() - start) * 1000;
}"""


def make_file(path, count):
    """An embedding of random features in twenty groups, all with one thumbnail."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(20, 32))
    vectors = centers[rng.integers(20, size=count)] + 0.4 * rng.normal(size=(count, 32))
    jpeg = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(jpeg, "JPEG")
    table = pa.table(
        {
            "path": [f"{i:06}.jpg" for i in range(count)],
            "vector": pa.FixedSizeListArray.from_arrays(
                pa.array(vectors.astype(np.float32).ravel()), 32
            ),
            "thumbnail": pa.array([jpeg.getvalue()] * count, pa.binary()),
        }
    )
    pq.write_table(table, path)


def drag(tab):
    """Drag the map for three seconds; return frames a second and seconds of a core for a frame."""
    before = browser_seconds()
    rate = tab.evaluate(DRAG)
    return f"{rate:.1f} frames/s, {(browser_seconds() - before) / (3 * rate):.3f} s of a core each"


def browser_seconds():
    """The processor time that all processes of the browser have used."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "chrom" in process.name():
                times = process.cpu_times()
                total += times.user + times.system
    return total


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=100_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "points.parquet"
        make_file(file, options.images)
        command = [sys.executable, "-m", "simsiam", "explore", str(file), "--no-browser"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
        try:
            address = server.stdout.readline().strip()
            server.stdout.readline()
            with sync_playwright() as play:
                path = "/usr/bin/chromium"
                browser = play.chromium.launch(executable_path=path, args=FLAGS)
                tab = browser.new_page(viewport={"width": 1440, "height": 900})
                tab.set_default_timeout(120_000)
                start = time.perf_counter()
                tab.goto(address)
                tab.wait_for_function("() => window.explore?.map.frames > 0")
                print(f"{options.images:,} points: first paint {time.perf_counter() - start:.1f} s")
                print(f"dragging while the map is arranged: {drag(tab)}")
                for _ in range(100):
                    if tab.evaluate("fetch('state').then((r) => r.json()).then((s) => s.arranged)"):
                        break
                    tab.wait_for_timeout(1000)
                tab.wait_for_timeout(3000)
                load = f"load of the machine {psutil.getloadavg()[0]:.1f}"
                print(f"dragging afterwards: {drag(tab)} ({load})")
                print(
                    f"renderer: {tab.evaluate('explore.map.points.constructor.name')}", flush=True
                )
                browser.close()
        finally:
            server.kill()
            server.wait()


if __name__ == "__main__":
    main()
