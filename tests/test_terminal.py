"""What a person sees in a terminal of 80 columns."""

import os
import re
import struct
import subprocess
import sys

import pytest

# Only POSIX has pseudo-terminals.
fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))

PROGRESS = """
import time
from simsiam.training.progress import ProgressLine
values = dict(images_per_second=1234.0, loss=-0.987, z_std_sqrt_d=0.99, view_retrieval=100.0,
              knn_top1=99.9, data_wait={wait})
with ProgressLine(0, {steps}, 10) as line:
    line.start_time -= {seconds}
    for step in range(1, 4):
        line.update(step, values)
        time.sleep(0.15)
"""
SUMMARY = """
from simsiam.commands.output import print_lines
print_lines("Fewer than 200 steps are too few for a verdict: train longer, or use a smaller batch.")
"""


def in_terminal(code):
    """Run Python code in a terminal of 80 columns; return the lines that were drawn."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")}
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(
        command, stdout=slave, stderr=slave, stdin=slave, env=environment | {"TERM": "xterm"}
    )
    os.close(slave)
    drawn = b""
    try:
        while part := os.read(master, 65536):
            drawn += part
    except OSError:  # the program has ended
        pass
    assert process.wait() == 0, drawn
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode())
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


@pytest.mark.parametrize("wait", [0.05, 0.5])
def test_the_progress_line_has_a_bar_hours_and_whole_words(wait):
    lines = in_terminal(PROGRESS.format(steps=2000, seconds=60, wait=wait))
    last = lines[-1]
    assert all(len(line) <= 80 for line in lines)
    assert re.match(r"epoch 0\.3/200 [━╸╺]{8,} 1\d:\d\d:\d\d left 1234/s loss -0\.99 std", last)
    assert "views 100%" in last and "wait" not in last  # no room, or not worth it


def test_the_line_moves_with_every_step():
    lines = in_terminal(PROGRESS.format(steps=2000, seconds=60, wait=0))
    assert {line.split()[1] for line in lines} >= {"0.1/200", "0.2/200", "0.3/200"}


def test_lines_are_broken_between_words():
    assert in_terminal(SUMMARY) == [
        "Fewer than 200 steps are too few for a verdict: train longer, or use a smaller",
        "batch.",
    ]


def test_a_closed_output_ends_no_command():
    command = f"{sys.executable} -m simsiam methods >&-"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_ctrl_c_while_the_interpreter_ends_prints_nothing():
    code = (
        "import atexit, os, signal, sys\nfrom simsiam.commands.main import main\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
        "sys.argv = ['simsiam', '--version']\nsys.exit(main())\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""


def test_a_command_stopped_inside_of_exec_ends_with_the_code_of_its_signal(tmp_path):
    """Libraries make classes with `exec`; an interrupt in there is remembered until the end."""
    (tmp_path / "stopped.py").write_text(
        "import signal, sys\n"
        "from simsiam.commands import main\n"
        "main.run_command = lambda _: exec('raise KeyboardInterrupt(signal.SIGTERM)')\n"
        "sys.exit(main.main())\n"
    )
    command = [sys.executable, "-m", "stopped"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 143, result.returncode
    assert result.stderr == "simsiam: stopped by SIGTERM; no half-written file is left\n"
