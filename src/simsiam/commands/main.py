"""The entry point: find the verb, run it, and turn errors and signals into exit codes.

A verb is a module of this package (see its docstring). `simsiam --help` imports these modules, but
nothing that loads torch: a verb imports what it needs when it runs.
"""

import argparse
import codecs
import io
import os
import pkgutil
import shutil
import signal
import sys
import textwrap
import threading
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from types import ModuleType

from simsiam import __version__, commands
from simsiam.commands.arguments import Parser
from simsiam.errors import Stopped, UsageError, WorkFailed, printable, unknown_name
from simsiam.utils.system import STOP_SIGNALS, is_broken_pipe, keep_freed_memory

NOT_VERBS = ("main", "arguments", "output")  # modules of this package that are no verbs
GROUPS = (
    "training", "data", "evaluation", "embeddings", "checkpoints", "run folders", "laboratory",
)  # fmt: skip
ASCII_SYMBOLS = str.maketrans(
    {"–": "-", "−": "-", "±": "+-", "×": "x", "√": "sqrt ", "τ": "tau", "²": "^2"}
)
BROKEN_PIPE = 13  # the number of SIGPIPE
VERB_COLUMN = 14  # characters that a verb's name takes in the list of verbs


def verb_names() -> list[str]:
    """List the verbs, without importing them."""
    modules = (module.name for module in pkgutil.iter_modules(commands.__path__))
    return [name for name in modules if name not in NOT_VERBS]


def find_verb(name: str) -> ModuleType:
    """Import the module of a verb.

    Args:
        name: The verb.

    Raises:
        UsageError: There is no such verb; the message names the nearest.
    """
    if name not in (names := verb_names()):
        raise unknown_name("command", name, names)
    return import_module(f"simsiam.commands.{name}")


def build_parser() -> Parser:
    """Build the parser of `simsiam` without a verb. Its help lists the verbs."""
    parser = Parser(
        "simsiam",
        usage="simsiam COMMAND [ARGUMENT ...]",
        description=_format_verbs(),
        epilog="`simsiam COMMAND --help` lists the arguments of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"simsiam {__version__}")
    return parser


def build_verb_parser(name: str) -> Parser:
    """Build the parser of one verb.

    Args:
        name: The verb.

    Raises:
        UsageError: There is no such verb; the message names the nearest.
    """
    verb = find_verb(name)
    parser = Parser(
        f"simsiam {name}",
        usage=getattr(verb, "USAGE", None),
        description=f"{verb.HELP[0].upper()}{verb.HELP[1:]}.",
        epilog=getattr(verb, "EPILOG", None),
    )
    verb.add_arguments(parser)
    return parser


def _format_verbs() -> str:
    """Make the list of verbs, in groups."""
    verbs = {name: find_verb(name) for name in verb_names()}
    width = shutil.get_terminal_size().columns - 2
    lines = ["Learn image features without labels, with SimSiam (Chen & He, 2021)."]
    for group in GROUPS:
        lines += ["", f"{group}:"]
        for name, verb in verbs.items():
            if group == verb.GROUP:
                first = f"  {name}".ljust(VERB_COLUMN)
                rest = " " * VERB_COLUMN
                lines += textwrap.wrap(
                    verb.HELP, width, initial_indent=first, subsequent_indent=rest
                )
    return "\n".join(lines)


def parse(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse arguments.

    Args:
        parser: The parser.
        arguments: The arguments, as texts.

    Raises:
        UsageError: An argument is wrong, missing or unknown.
    """
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise unknown_name("argument", unknown[0].split("=")[0], parser.flags())
    return options


def run_command(arguments: Sequence[str]) -> None:
    """Run one command.

    Args:
        arguments: The command line without the program's name.

    Raises:
        UsageError: A wrong verb or argument.
        WorkFailed: The work failed.
        Stopped: A signal stopped the work.
    """
    if not arguments:
        build_parser().print_help()
        return
    if arguments[0].startswith("-"):
        parse(build_parser(), arguments)
        raise UsageError("a command comes first: `simsiam --help` lists them")
    name, *rest = arguments
    options = parse(build_verb_parser(name), rest)
    verb = find_verb(name)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not hasattr(verb, "MULTI_PROCESS"):
        allowed = [other for other in verb_names() if hasattr(find_verb(other), "MULTI_PROCESS")]
        raise UsageError(
            f"{name} runs in one process: start it without torchrun. "
            f"Commands that torchrun can start: {', '.join(allowed)}"
        )
    verb.run(options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and print errors as one line on stderr.

    Args:
        argv: The command line without the program's name; by default that of this process.

    Returns:
        The exit code. 0: done. 1: the work failed. 2: wrong usage. 128 + n: stopped by signal n.
    """
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):  # a terminal may not have every character
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="symbols")
    previous_handlers = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in set(STOP_SIGNALS) - {signal.SIGINT}:
                previous_handlers[number] = signal.signal(number, raise_interrupt)
        run_command(sys.argv[1:] if argv is None else argv)
        flush_output()  # at Python's end, an error would be a traceback
        return 0
    except (UsageError, WorkFailed, Stopped, OSError) as error:
        if is_broken_pipe(error):  # the reader has ended, as in `... | head`
            discard_output()
            return 128 + BROKEN_PIPE
        said = str(error)
        if isinstance(error, OSError) and not error.filename and error.errno:
            reason = os.strerror(error.errno)
            if error.strerror == reason:  # otherwise a library says more
                said = f"{reason}: of the output, or of a file that the system does not name"
        rank = f", process {os.environ['RANK']}" if "RANK" in os.environ else ""
        with suppress(OSError):  # the exit code says it too
            print(f"simsiam{rank}: {printable(' '.join(said.split()))}", file=sys.stderr)
        if isinstance(error, Stopped):
            return 128 + error.signum
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt as error:
        number = signal.Signals(*error.args or [signal.SIGINT])
        message = f"stopped by {number.name}; no half-written file is left"
        print(f"simsiam: {message}", file=sys.stderr)
        exec("")  # Python forgets an interrupt inside of `exec`; else `python -m` ends by SIGINT
        return 128 + number
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
        if argv is None and previous_handlers:  # Ctrl-C at the end of Python prints a traceback
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def flush_output() -> None:
    """Write what is left for the standard output.

    Raises:
        WorkFailed: It cannot be written.
        OSError: Its reader has ended.
    """
    try:
        if sys.stdout is not None:  # None if it was closed
            sys.stdout.flush()
    except OSError as error:
        if is_broken_pipe(error):
            raise
        discard_output()
        raise WorkFailed(f"cannot write the output: {error.strerror}") from None


def discard_output() -> None:
    """Discard what is left for the standard output, so that Python does not complain at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def replace_symbols(error: UnicodeError) -> tuple[str, int]:
    """Write the symbols of tables in ASCII, and other characters that a terminal lacks as escapes.

    Args:
        error: What encoding a text raised.

    Returns:
        The replacement, and where to go on.
    """
    if isinstance(error, UnicodeEncodeError):
        text = error.object[error.start : error.end].translate(ASCII_SYMBOLS)
        return text.encode("ascii", "backslashreplace").decode(), error.end
    raise error


codecs.register_error("symbols", replace_symbols)


def raise_interrupt(number: int, frame: object) -> None:
    """Handle another stop signal like Ctrl-C, so that half-written files are removed.

    KeyboardInterrupt is no Exception, so code that skips unreadable images does not catch it.

    Args:
        number: The signal.
        frame: Unused.

    Raises:
        KeyboardInterrupt: Always, with the signal as its argument.
    """
    raise KeyboardInterrupt(number)
