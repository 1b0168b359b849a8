"""Shell scripts and lists that act on images; the person runs them, this program never does.

A script only says what it would do until it gets --yes. It deletes nothing: what was dropped is
moved into a folder beside the images.
"""

import re
import shlex
from collections.abc import Mapping, Sequence

from simsiam.utils.names import join_names

HEAD = """#!/bin/sh
# Written by simsiam explore. {purpose}
# sh {name} FOLDER          shows what it would do
# sh {name} FOLDER --yes    does it; FOLDER is the folder of the images
set -eu
if [ $# -lt 1 ] || [ ! -d "$1" ]; then echo "usage: sh {name} FOLDER [--yes]" >&2; exit 2; fi
folder=$(CDPATH= cd -- "$1" && pwd)
out="$folder-{suffix}"
yes=${{2:-}}
if [ "$yes" != "" ] && [ "$yes" != "--yes" ]; then echo "unknown: $yes" >&2; exit 2; fi
act() {{
  if [ ! -f "$folder/$1" ]; then printf 'not there: %s\\n' "$1"; return; fi
  if [ -e "$out/$2" ]; then printf 'in the way: %s\\n' "$out/$2"; return; fi
  printf '{verb} %s -> %s\\n' "$1" "$out/$2"
  if [ "$yes" = "--yes" ]; then
    mkdir -p -- "$(dirname -- "$out/$2")"
    {command} -- "$folder/$1" "$out/$2"
  fi
}}
"""
TAIL = """if [ "$yes" != "--yes" ]; then echo "nothing was changed: add --yes to do it"; fi
"""


def move_script(name: str, paths: Sequence[str], left_out: int = 0) -> bytes:
    """Write a script that moves dropped images out of their folder.

    Args:
        name: The name of the script.
        paths: The images, relative to their folder.
        left_out: The number of images that are no files there any more.

    Returns:
        The script.
    """
    purpose = f"It moves {len(paths)} images into FOLDER-dropped, and deletes nothing."
    pairs = [(path, path) for path in paths]
    return _script(name, purpose + _note(left_out), "dropped", "move", "mv", pairs)


def copy_script(name: str, folders: Mapping[str, str], left_out: int = 0) -> bytes:
    """Write a script that copies images into one folder per label, cluster or decision.

    Args:
        name: The name of the script.
        folders: The folder of each image, by its path relative to the folder of the images.
        left_out: The number of images that are no files there any more.

    Returns:
        The script.
    """
    purpose = f"It copies {len(folders)} images into folders in FOLDER-sorted."
    pairs = [(path, f"{folder_name(label)}/{path}") for path, label in folders.items()]
    return _script(name, purpose + _note(left_out), "sorted", "copy", "cp -p", pairs)


def folder_name(label: str) -> str:
    """Turn a label into the name of a folder on any system.

    Args:
        label: The label.
    """
    name = re.sub(r'[<>:"/\\|?*\x00-\x1f]', "_", label).strip(" .")
    return name or "_"


def _note(left_out: int) -> str:
    return f" Images without a file, left out: {left_out}." if left_out else ""


def _script(
    name: str, purpose: str, suffix: str, verb: str, command: str, pairs: list[tuple[str, str]]
) -> bytes:
    head = HEAD.format(name=name, purpose=purpose, suffix=suffix, verb=verb, command=command)
    lines = [f"act {shlex.quote(source)} {shlex.quote(target)}" for source, target in pairs]
    return join_names([head + "\n".join([*lines, TAIL.rstrip()])])
