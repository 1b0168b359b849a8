"""A stranger's file costs bounded memory and time: files made by hand to cost much.

Each is read in a process of its own, whose memory and time are measured, its children included.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).parent / "stress"))
import hostile_files as made

from simsiam.data import decode

MAX_MEMORY = 3 * 2**30
MAX_SECONDS = 10
CPU_LIMIT = 40  # seconds after which a process is ended
READ = """
import sys
from simsiam.data.decode import Unreadable, decode_image, read_header
try:
    for file in sys.argv[1:]:
        print(*read_header(file)[:2])
        print(decode_image(file).shape)
except Unreadable as error:
    print(f"reason: {error}")
"""
OPEN = """
import sys
from simsiam.data.decode import Unreadable
from simsiam.errors import UsageError, WorkFailed
from simsiam.sources.open_source import open_source
try:
    images = open_source(sys.argv[1]).train
    print(len(images), "images")
    for i in range(len(images)):
        print(images.read_header(i)[:2], images.read(i).shape)
except (Unreadable, UsageError, WorkFailed) as error:
    print(f"reason: {error}")
"""


# Runs a command and writes what it took. It is small: a process that it starts counts as much
# memory as the one that it is a copy of, and that of the tests has gigabytes.
MEASURE = """
import json, os, sys
pid = os.fork()
if not pid:
    os.execvp(sys.argv[2], sys.argv[2:])
_, status, usage = os.wait4(pid, 0)
seconds, memory = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 2**10
with open(sys.argv[1], "w") as file:
    json.dump([os.waitstatus_to_exitcode(status), seconds, memory], file)
"""


def run(*command, limit=600):
    """Run a command; return its output, its exit code, seconds of CPU, and bytes of memory."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder, "record.json")
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", MEASURE, record, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT, CPU_LIMIT)),
        )
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            pytest.fail(f"it runs for more than {limit} s")
        return output.decode(), *json.loads(record.read_text())


def read_cheaply(code, *files):
    """Run code on files within the limits; return what it prints, which is no traceback."""
    output, exit_code, seconds, memory = run(sys.executable, "-c", code, *map(str, files))
    assert exit_code == 0 and "Traceback" not in output, output[-2000:]
    assert memory < MAX_MEMORY and seconds < MAX_SECONDS, (output, seconds, memory)
    return output


# --- images ---

QUICK = [  # seconds, and small files
    "jpeg of 20000 scans.jpg",
    "jpeg of equal tags.jpg",
    "png of equal tags.png",
    "png of equal tags in a text.png",
    "tiff of equal places.tif",
    "tiff of floats.tif",
    "tiff of 17 channels.tif",
    "bmp of runs.bmp",
    "eps.jpg",
]


@pytest.mark.parametrize("name", QUICK)
def test_an_image_costs_bounded_memory_and_time(tmp_path, name):
    (tmp_path / name).write_bytes(made.images()[name]())
    output = read_cheaply(READ, tmp_path / name)
    assert output.count("reason: ") <= 1 and len(output) < 500


PACKED = {
    "jpeg of empty segments.jpg": lambda: made.jpeg_with(b"\xff\xe0\0\2" * 2**24),
    "jpeg of junk.jpg": lambda: made.jpeg_with(b"a" * 2**26),
    "png of empty chunks.png": lambda: made.png_with(made.png_chunk(b"abCd") * 2**22),
    "gif of comments.gif": lambda: made.gif_with_comments(2**22),
    "tiff of many strips.tif": lambda: made.tiff_of_strips(2**24),
}


@pytest.mark.long
@pytest.mark.parametrize("name", PACKED)
def test_a_small_zip_costs_bounded_memory_and_time(tmp_path, name):
    path = made.write_zip(tmp_path / "a.zip", PACKED[name](), name)
    assert path.stat().st_size < 2**19
    output = read_cheaply(OPEN, path)
    assert output.startswith("1 images") and len(output) < 500


@pytest.mark.parametrize("work", ["header", "pixels"])
def test_numbers_of_a_tiff_are_counted_before_they_are_read(work):
    content = made.tiff_of_strips(2**20 + 1)
    read = decode.read_header if work == "header" else decode.decode_image
    with pytest.raises(decode.Unreadable, match="1,048,577 values; at most 1,048,576"):
        read(content)


def test_a_sparse_file_is_not_read(tmp_path):
    sparse = made.write_sparse(tmp_path / "a.jpg", made.encode("JPEG", 96), 6 * made.GIB)
    output = read_cheaply(READ, sparse)
    assert "a file of 6,442,450,944 bytes; at most 536,870,912" in output
    code = "import sys; from simsiam.commands.main import main; sys.exit(main(sys.argv[1:]))"
    out = tmp_path / "facts.json"
    output, exit_code, _, memory = run(
        sys.executable, "-c", code, "inspect", str(tmp_path), "--out", str(out)
    )
    assert exit_code in (0, 1) and memory < MAX_MEMORY and "Traceback" not in output
    assert "6,442,450,944 bytes" in output


def slow_image():
    """Make an image that takes half a minute."""
    return made.jpeg_with(b"\xff" * 2**26)


def test_sigterm_does_not_wait_for_a_decoder(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(slow_image())
    code = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n" + (
        "print('ready', flush=True)\n"
        "from simsiam.data.decode import decode_image\ndecode_image(sys.argv[1])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with process, process.stdout:
        assert process.stdout.readline() == b"ready\n"
        time.sleep(1.5)  # it decodes now
        assert process.poll() is None
        sent = time.monotonic()
        process.terminate()
        try:
            assert process.wait(20) == 7
        finally:
            process.kill()
        assert time.monotonic() - sent < 2


def test_a_decoder_that_is_killed_costs_one_image(tmp_path):
    """And no process is left behind."""
    psutil = pytest.importorskip("psutil")
    from simsiam.data.decode import Unreadable, decode_image

    tiff, bad = made.encode("TIFF"), slow_image()
    assert decode_image(tiff).shape == (48, 48, 3)
    with pytest.raises(Unreadable, match="decoding it takes more than 7 s"):
        decode_image(bad)
    assert decode_image(tiff).shape == (48, 48, 3)
    for child in psutil.Process().children():
        child.kill()
    with pytest.raises(Unreadable, match="its decoder ended with SIGKILL"):
        decode_image(tiff)
    assert decode_image(tiff).shape == (48, 48, 3)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import psutil, sys\nfrom simsiam.data.decode import decode_image\n"
            "decode_image(sys.stdin.buffer.read())\n"
            "print(psutil.Process().children()[0].pid)",
        ],
        input=tiff,
        capture_output=True,
        check=True,
    )
    assert not psutil.pid_exists(int(done.stdout))


def test_thumbnails_are_opened_by_the_same_door(tmp_path):
    """An EPS would start Ghostscript; others are too large, or no image at all."""
    from simsiam.embeddings.duplicates import duplicates
    from simsiam.errors import UsageError

    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(4, np.float32)), 2)
    for thumbnail, reason in {
        made.EPS: "not one of",
        b"": "an empty file",
        made.encode("JPEG", 1100): "1100x1100 pixels are too many",
        made.encode("JPEG")[:300]: "damaged",
    }.items():
        table = {
            "path": ["a", "b"],
            "vector": vectors,
            "thumbnail": [made.encode("JPEG"), thumbnail],
        }
        pq.write_table(pa.table(table), tmp_path / "e.parquet")
        with pytest.raises(UsageError, match=f"the thumbnail of b cannot be read: .*{reason}"):
            duplicates(tmp_path / "e.parquet")
    for thumbnails in ([1, 2], ["a", "b"], [None, b""]):
        table = {"path": ["a", "b"], "vector": vectors, "thumbnail": thumbnails}
        pq.write_table(pa.table(table), tmp_path / "e.parquet")
        with pytest.raises(UsageError, match="not a JPEG file in each row"):
            duplicates(tmp_path / "e.parquet")


# --- tar, Parquet ---


@pytest.mark.parametrize("size", [-1, -512, -1536, -(2**40)])
@pytest.mark.parametrize("shards", [False, True])
def test_a_tar_whose_sizes_are_negative_ends(tmp_path, size, shards):
    path = tmp_path / ("shards" if shards else "a.tar")
    path.parent.mkdir(exist_ok=True)
    if shards:
        path.mkdir()
    made.write_tar_of_negative_size(path / "train-000000.tar" if shards else path, size)
    output = read_cheaply(OPEN, path)
    assert "damaged" in output or output.startswith("1 images")


def test_a_tar_that_ends_in_a_sparse_header_is_damaged(tmp_path):
    path = made.write_tar_cut_in_a_sparse_header(tmp_path / "a.tar")
    assert "reason: " in read_cheaply(OPEN, path)


NEIGHBORS = """
import sys
from simsiam.embeddings.table import read_embeddings
from simsiam.errors import UsageError
try:
    print(read_embeddings(sys.argv[1]).vectors.shape)
except UsageError as error:
    print(f"reason: {error}")
"""


@pytest.mark.parametrize(
    "write",
    [
        lambda path: made.write_vectors(path, 100 * 1024, 1024),
        lambda path: made.write_repeated_text(path, 4000, 2**20),
        lambda path: made.write_repeated_text(path, 4000, 2**20, "label"),
        lambda path: made.write_shared_beginnings(path, 20_000, 2**10),
    ],
    ids=["vectors", "path", "label", "beginnings"],
)
def test_a_small_embedding_costs_bounded_memory(tmp_path, write):
    path = write(tmp_path / "e.parquet")
    assert path.stat().st_size < 2**20
    output = read_cheaply(NEIGHBORS, path)
    assert "reason: " in output and "bytes in memory; at most " in output


THREADS = """
import sys, psutil
from simsiam.data.parquet_files import read_parquet
before = psutil.Process().num_threads()
read_parquet(sys.argv[1])
print("threads:", psutil.Process().num_threads() - before)
"""


def test_no_thread_that_reads_outlives_the_interpreter(tmp_path):
    """A thread of Arrow's that still holds bytes of Python's at the exit aborts the process."""
    assert "threads: 0" in read_cheaply(THREADS, made.write_vectors(tmp_path / "e.parquet", 99, 8))


def test_an_embedding_within_the_limit_is_read(tmp_path):
    path = made.write_vectors(tmp_path / "e.parquet", 20 * 1024, 256)
    assert "[20480, 256]" in read_cheaply(NEIGHBORS, path)


def test_a_footer_that_lies_about_its_pages_is_not_believed(tmp_path):
    path = made.write_lying_footer(tmp_path / "a.parquet", 2**29)
    assert path.stat().st_size < 2**17
    output = read_cheaply(OPEN, path)
    assert "may take 536,8" in output


def test_a_large_footer_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [made.encode("PNG")]}), path)
    data = path.read_bytes()
    size = 2**24
    path.write_bytes(data[:-8] + bytes(size) + size.to_bytes(4, "little") + b"PAR1")
    assert "a footer of 16,777,216 bytes; at most 8,388,608" in read_cheaply(OPEN, path)


# --- models ---


@pytest.mark.parametrize(
    "settings",
    [
        {"width": 16384, "backbone": "resnet50"},
        {"width": 2**40},
        {"dim": 2**40},
        {"proj_hidden": 2**16, "proj_layers": 100},
        {"method": "moco_v2", "queue": 2**40},
        {"method": "swav", "prototypes": 2**40},
        {"backbone": "patches/" + "+".join(["512"] * 10_000)},
        {"target": "expectation", "target_views": 10**9},
    ],
    ids=lambda settings: str(settings)[:60],
)
def test_a_model_is_bounded_before_it_is_built(tmp_path, settings):
    code = """
import json, sys
import simsiam
from simsiam.config.recipes import Recipe
from simsiam.errors import UsageError
try:
    recipe = Recipe().replace(image_size=32, **json.loads(sys.argv[1]))
    simsiam.build(recipe.method, backbone=recipe.backbone, width=recipe.width, image_size=512)
    print("built")
except UsageError as error:
    print(f"reason: {error}")
"""
    output = read_cheaply(code, json.dumps(settings))
    assert output.startswith("reason: ") and len(output) < 600


# --- pipes, long paths, downloads ---

MAIN = "import sys; from simsiam.commands.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize("suffix", [".tar", ".zip", ".parquet", ".txt", ".jpg", ".npy", ""])
@pytest.mark.parametrize("link", [False, True])
def test_a_pipe_in_place_of_a_source_is_one_line(tmp_path, suffix, link):
    path = tmp_path / f"pipe{suffix}"
    os.mkfifo(tmp_path / "real" if link else path)
    if link:
        path.symlink_to(tmp_path / "real")
    order = ["shard", str(path), "--out", str(tmp_path / "shards")]
    output, exit_code, *_ = run(sys.executable, "-c", MAIN, *order)
    assert exit_code in (1, 2) and output.startswith("simsiam: ") and output.count("\n") == 1
    assert not (tmp_path / "shards").exists()


def test_a_shard_that_becomes_a_pipe_does_not_hang(tmp_path):
    code = """
import os, sys
from pathlib import Path
from simsiam.data.decode import Unreadable
from simsiam.errors import UsageError, WorkFailed
from simsiam.sources import open_source as sources
sources.MAX_RESIDENT_BYTES = 0
images = sources.open_source(sys.argv[1]).train
folder = Path(sys.argv[1])
for path in [*folder.glob("*.tar"), *folder.glob("*.parquet")] or [folder]:
    path.unlink()
    os.mkfifo(path)
try:
    images.read(0)
except (Unreadable, UsageError, WorkFailed) as error:
    print(f"reason: {error}")
"""
    made.write_zip(tmp_path / "a.zip", made.encode("PNG"), "a.png")
    from simsiam.sources.write_shards import write_shards

    for kind in ("tar", "parquet"):
        write_shards(tmp_path / "a.zip", out=tmp_path / kind, format=kind)
    for source in ("tar", "parquet", "a.zip"):
        output, exit_code, *_ = run(sys.executable, "-c", code, str(tmp_path / source))
        assert exit_code == 0 and "a pipe, a device or a socket" in output


def test_a_path_too_long_for_the_system_costs_only_itself(tmp_path):
    folder, before = tmp_path / "photos", Path.cwd()
    folder.mkdir()
    (folder / "a.png").write_bytes(made.encode("PNG"))
    try:
        os.chdir(folder)
        for _ in range(22):
            os.mkdir("d" * 200)
            os.chdir("d" * 200)
        Path("b.png").write_bytes(made.encode("PNG"))
    finally:
        os.chdir(before)
    output = read_cheaply(OPEN, folder)
    assert "1 images" in output and "paths that are too long" in output
    (tmp_path / "list.txt").write_text(f"{folder}/a.png\n{folder}/{'d/' * 4000}b.png\n")
    output, exit_code, *_ = run(
        sys.executable,
        "-c",
        MAIN,
        "shard",
        str(tmp_path / "list.txt"),
        "--out",
        str(tmp_path / "s"),
    )
    assert exit_code == 0 and "1 images cannot be read" in output


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("cut", [0, 1, 500, 5000])
def test_a_store_that_ends_in_the_middle_of_a_file_is_one_line(tmp_path, kind, cut):
    """Clients of stores raise errors of their own, which are no OSError."""
    fsspec = pytest.importorskip("fsspec")
    from fsspec.implementations.memory import MemoryFileSystem

    from simsiam.errors import UsageError, WorkFailed
    from simsiam.sources.open_source import open_source
    from simsiam.sources.write_shards import write_shards

    class ClientPayloadError(Exception):
        pass

    class Cut(MemoryFileSystem):
        protocol, store, pseudo_dirs = "cut", {}, [""]

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.replace("cut://", "memory://"))

        def _open(self, path, *args, **options):
            file = super()._open(path, *args, **options)
            read = file.read

            def read_some(size=-1):
                if (data := read(size)) and file.tell() > cut:
                    raise ClientPayloadError("Response payload is not completed\x1b[31m\n")
                return data

            file.read = read_some
            return file

    fsspec.register_implementation("cut", Cut, clobber=True)
    made.write_zip(tmp_path / "a.zip", made.encode("PNG", 90), "a.png")
    (shard,) = write_shards(tmp_path / "a.zip", out=tmp_path / "s", format=kind).glob(f"*.{kind}")
    Cut.store.clear()
    fsspec.filesystem("memory").store.clear()
    system = fsspec.filesystem("cut")
    system.pipe(f"/{kind}{cut}/{shard.name}", shard.read_bytes())
    try:
        images = open_source(f"cut://{kind}{cut}").train
        images.read(0)
    except (UsageError, WorkFailed) as error:
        assert str(error).isprintable() and "ClientPayloadError" in str(error)
    else:
        assert cut == 5000


@pytest.mark.parametrize("chunked", [False, True])
def test_weights_whose_download_is_cut_are_one_line(tmp_path, monkeypatch, chunked):
    """A server that closes the connection in the middle of its answer."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    from simsiam.errors import WorkFailed
    from simsiam.runs.checkpoints import published_weights

    class Server(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.send_response(200)
            if chunked:
                self.send_header("Transfer-Encoding", "chunked")
            else:
                self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"ffff\r\n" * chunked + bytes(1000))
            self.close_connection = True

        def log_message(self, *_):
            pass

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/weights.pth"
    release = published_weights.Release(url, "0123abcd", {}, "")
    try:
        with pytest.raises(WorkFailed, match="cannot be downloaded from") as error:
            published_weights.fetch("weights", release)
    finally:
        server.shutdown()
    assert "\n" not in str(error.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# --- the cache ---

CACHED = """
import sys
from simsiam.sources import open_source as sources
from simsiam.sources.file_index import load_index
sources.MAX_RESIDENT_BYTES = 0
source = sources.open_source(sys.argv[1])
index = load_index([sys.argv[1]], source)
print(len(source.train), sum(source.train.read(i).sum() for i in range(len(source.train))),
      index.table["reason"].to_pylist(), list(source.train.keys))
"""


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_damaged_file_in_the_cache_is_made_again(tmp_path, kind, monkeypatch):
    """Bits anywhere, cuts, and lies: the process never ends by a signal or with other images."""
    from simsiam.sources.write_shards import write_shards

    monkeypatch.setenv("SIMSIAM_CACHE", str(tmp_path / "cache"))
    made.write_zip(tmp_path / "a.zip", made.encode("PNG"), "a.png")
    shards = write_shards(tmp_path / "a.zip", out=tmp_path / "shards", format=kind)
    (shards / "index.arrow").unlink(missing_ok=True)
    code = "\n".join(
        [
            "import os, random, sys, io, contextlib, traceback",
            "from pathlib import Path",
            "cache = Path(os.environ['SIMSIAM_CACHE'])",
            f"body = {CACHED!r}",
            "def text():",
            "    output = io.StringIO()",
            "    with contextlib.redirect_stdout(output):",
            "        exec(body, {})",
            "    return output.getvalue()",
            "true = text()",
            "files = [p for p in cache.rglob('*.arrow')]",
            "assert len(files) == 2, files",
            "kept = {p: p.read_bytes() for p in files}",
            "rng = random.Random(0)",
            "for trial in range(150):",
            "    for path, data in kept.items():",
            "        data = bytearray(data)",
            "        at = rng.randrange(len(data))",
            "        if trial % 5 == 4: del data[at:]",
            "        elif trial % 5 == 3: data[at:at + 8] = rng.randbytes(8)",
            "        else: data[at] ^= 1 << rng.randrange(8)",
            "        path.write_bytes(data)",
            "    assert text() == true, trial",
            "print('equal')",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(shards)], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, "equal\n"), done.stderr[-2000:]


def test_a_catalog_beside_shards_is_never_unpacked(tmp_path, monkeypatch):
    """A compressed catalog may take any memory; the shards are scanned instead."""
    from simsiam.sources.open_source import open_source
    from simsiam.sources.write_shards import write_shards

    monkeypatch.setenv("SIMSIAM_CACHE", str(tmp_path / "cache"))
    made.write_zip(tmp_path / "a.zip", made.encode("PNG"), "a.png")
    shards = write_shards(tmp_path / "a.zip", out=tmp_path / "shards")
    catalog = pa.ipc.open_file((shards / "index.arrow").read_bytes()).read_all()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with (
        pa.OSFile(str(shards / "index.arrow"), "wb") as file,
        pa.ipc.new_file(file, catalog.schema, options=options) as to,
    ):
        to.write_table(catalog)
    source = open_source(shards)
    assert len(source.train) == 1
    assert "is damaged, and the shards were scanned instead" in str(source.damage)
