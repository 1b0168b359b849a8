"""Decode images that are not plainly harmless in a process of its own, with limits.

The process is started for the first such image and kept for the next ones; threads that decode at
the same time have one each. It may use MEMORY_LIMIT bytes of memory and CPU_LIMIT seconds for an
image; if it uses more, or crashes, that costs this image and nothing else. While it decodes, this
program can be stopped.

The two send each other a line of JSON, followed by the bytes of a file or by pixels. Nothing that
comes back is unpickled.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Literal, TypeAlias, TypedDict

import numpy as np

from simsiam.errors import WorkFailed
from simsiam.utils.system import WINDOWS, limit_process

MEMORY_LIMIT = 9 * 2**28  # bytes of address space: 2.25 GiB
CPU_LIMIT = 7  # seconds for an image
WALL_LIMIT = 60.0 if WINDOWS else 600.0  # seconds that it may take with waiting for a disk
MAX_LINE = 2**16
# Threads need address space, and libraries start one for each core.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TIFFFILE_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
}  # fmt: skip
START = (
    "import sys; sys.path[:] = {path!r}; from simsiam.data import decoder_process; "
    "from simsiam.data.decode import read_image; decoder_process.serve(read_image)"
)
READY = b"ready\n"

Work: TypeAlias = Literal["pixels", "header", "alpha"]


class Request(TypedDict):
    """What to do with a file.

    Attributes:
        work: What to find out.
        path: Its path; None if its bytes follow.
        size: Number of bytes that follow.
        channels: Number of channels to decode to.
        min_side: See `decode_image`.
    """

    work: Work
    path: str | None
    size: int
    channels: int
    min_side: int


class Answer(TypedDict, total=False):
    """What was found out.

    Attributes:
        reason: Why the file is unreadable.
        shape: Of the pixels that follow, uint8.
        header: Height, width and format.
        alpha: Whether there is an alpha channel.
    """

    reason: str
    shape: tuple[int, int, int]
    header: tuple[int, int, str]
    alpha: bool


Read: TypeAlias = Callable[[str | bytes, Request], tuple[Answer, np.ndarray | None]]


def call_decoder(
    work: Work, file: str | os.PathLike[str] | bytes, channels: int, min_side: int = 0
) -> tuple[Answer, np.ndarray | None]:
    """Let a process with limits read an image.

    Args:
        work: What to find out.
        file: A path, or the content of a file.
        channels: Number of channels to decode to.
        min_side: See `decode_image`.

    Returns:
        The answer, and pixels uint8 (H, W, channels) if its shape says so. If the process was
        ended by a limit or by a crash, the answer is the reason.

    Raises:
        WorkFailed: No process can be started.
    """
    content = file if isinstance(file, bytes) else b""
    path = None if isinstance(file, bytes) else os.path.abspath(os.fspath(file))
    request = Request(work=work, path=path, size=len(content), channels=channels, min_side=min_side)
    decoder = _take_decoder()
    try:
        answer = decoder.call(request, content)
        _idle.append(decoder)
        return answer
    except (OSError, EOFError, ValueError):  # it was ended
        return Answer(reason=decoder.end()), None
    except BaseException:  # this program is stopped in the middle of an answer
        decoder.process.kill()
        decoder.end()
        raise


class _Decoder:
    """A process that reads images, and the pipes to and from it."""

    def __init__(self) -> None:
        command = [sys.executable, "-I", "-c", START.format(path=sys.path)]
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **ENVIRONMENT},
            )
            ready = self._output.readline(MAX_LINE) == READY
        except OSError as error:
            raise _start_error(str(error)) from None
        self.owner = os.getpid()
        self.is_late = False
        self.finalize = weakref.finalize(self, _end_process, self.process, self.owner)
        if not ready:
            raise _start_error(self.end())

    @property
    def _input(self) -> IO[bytes]:
        assert self.process.stdin is not None
        return self.process.stdin

    @property
    def _output(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    def call(self, request: Request, content: bytes) -> tuple[Answer, np.ndarray | None]:
        """Send a request, and wait for the answer."""
        timer = threading.Timer(WALL_LIMIT, self._give_up)
        timer.daemon = True
        timer.start()
        try:
            self._input.write(json.dumps(request).encode() + b"\n")
            self._input.write(content)
            self._input.flush()
            answer: Answer = json.loads(self._output.readline(MAX_LINE))
            if "shape" not in answer:
                return answer, None
            pixels = np.empty(answer["shape"], np.uint8)
            rest = pixels.data.cast("B")
            while rest:
                count = self._output.readinto(rest)  # type: ignore[attr-defined]
                if not count:
                    raise EOFError
                rest = rest[count:]
            return answer, pixels
        finally:
            timer.cancel()

    def _give_up(self) -> None:
        self.is_late = True
        self.process.kill()

    def end(self) -> str:
        """End the process, and say what ended it before."""
        for pipe in (self._input, self._output):  # it ends when its input does
            with suppress(OSError):  # what was not sent cannot be
                pipe.close()
        try:
            code = self.process.wait(1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.finalize.detach()
        if self.is_late:
            return f"decoding it takes more than {WALL_LIMIT:g} s"
        if code == -getattr(signal, "SIGXCPU", 0):
            return f"decoding it takes more than {CPU_LIMIT} s"
        end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return (
            f"its decoder ended with {end}: the file is damaged, or needs more than "
            f"{MEMORY_LIMIT / 2**30:g} GiB of memory"
        )


def _start_error(reason: str) -> WorkFailed:
    return WorkFailed(f"the process that decodes images cannot be started: {reason}")


_idle: list[_Decoder] = []


def _take_decoder() -> _Decoder:
    with suppress(IndexError):
        while True:
            decoder = _idle.pop()
            if decoder.owner == os.getpid():  # and not of the process that this one is a copy of
                return decoder
    return _Decoder()


def _end_process(process: "subprocess.Popen[bytes]", owner: int) -> None:
    if os.getpid() == owner:
        process.kill()
        process.wait()


def serve(read: Read) -> None:
    """Answer requests until the input ends; what runs in the process.

    Args:
        read: Reads an image.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    limit_process(memory=MEMORY_LIMIT)
    source, output = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is no answer
    output.write(READY)
    output.flush()
    while line := source.readline(MAX_LINE):
        request: Request = json.loads(line)
        file = request["path"] or source.read(request["size"])
        limit_process(cpu_seconds=CPU_LIMIT)
        answer, pixels = read(file, request)
        output.write(json.dumps(answer).encode() + b"\n")
        if pixels is not None:
            output.write(pixels.data.cast("B"))
        output.flush()
