"""Verbs: each is one module, its flags stay what they were, and every flag has a help text."""

import argparse
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from simsiam.commands.main import (
    GROUPS,
    build_parser,
    build_verb_parser,
    find_verb,
    main,
    verb_names,
)
from simsiam.config.method import BUILTIN_CRITERIA, BUILTIN_TARGETS, Method, Views
from simsiam.config.protocols import Settings
from simsiam.config.recipes import Recipe
from simsiam.detection.schedules import Schedule

# Verbs, flags, destinations, defaults and numbers of values that scripts of users rely on.
STORED = json.loads((Path(__file__).parent / "flags.json").read_text())
WITHOUT_HELP = {"name", "views"}  # fields of Method that no flag sets


def describe(action: argparse.Action) -> dict[str, object]:
    default = "==SUPPRESS==" if action.default is argparse.SUPPRESS else action.default
    default = list(default) if isinstance(default, tuple) else default
    return {"dest": action.dest, "default": default, "nargs": action.nargs}


@pytest.mark.parametrize("verb", STORED)
def test_the_flags_of_a_verb_stay(verb):
    actions = build_verb_parser(verb)._actions
    found = {" ".join(a.option_strings) or a.metavar: describe(a) for a in actions}
    assert STORED[verb].items() <= found.items()


@pytest.mark.parametrize("verb", verb_names())
def test_every_argument_of_every_verb_has_help(verb):
    module, parser = find_verb(verb), build_verb_parser(verb)
    assert module.HELP and module.GROUP in GROUPS
    for action in parser._actions:
        assert action.help and action.help != argparse.SUPPRESS, action
    assert f"usage: simsiam {verb}" in parser.format_help()


@pytest.mark.parametrize("owner", [Recipe, Method, Views, Settings, Schedule])
def test_every_setting_has_help(owner):
    for field in fields(owner):
        if field.name not in WITHOUT_HELP:
            assert field.metadata["help"].strip(), field.name


def test_the_help_lists_every_verb():
    text = build_parser().format_help()
    for verb in verb_names():
        assert f"\n  {verb} " in text


def test_help_names_every_target_and_criterion():
    from simsiam.model.losses import CRITERIA
    from simsiam.model.targets import TARGETS

    assert set(BUILTIN_TARGETS) == set(TARGETS) and set(BUILTIN_CRITERIA) == set(CRITERIA)
    text = " ".join(build_verb_parser("pretrain").format_help().split())
    assert all(name in text for name in (*TARGETS, *CRITERIA))


def test_help_of_any_verb_loads_no_torch():
    code = (
        "import sys\n"
        "from simsiam.commands.main import build_verb_parser, main, verb_names\n"
        "main([])\n"
        "for verb in verb_names():\n"
        "    build_verb_parser(verb).format_help()\n"
        "assert not {'torch', 'numpy', 'pyarrow', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_verb_builds_its_own_flags_only():
    code = (
        "import sys\n"
        "from simsiam.commands.main import main\n"
        "main(['methods'])\n"
        "assert 'simsiam.commands.methods' in sys.modules\n"
        "assert not {'simsiam.commands.pretrain', 'simsiam.laboratory'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_without_arguments_the_help_is_printed(capsys):
    assert main([]) == 0
    output = capsys.readouterr().out
    assert "usage: simsiam COMMAND" in output and "pretrain" in output


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_and_version_exit_with_code_0(argument, capsys):
    with pytest.raises(SystemExit) as error:
        main([argument])
    assert error.value.code == 0 and "simsiam" in capsys.readouterr().out


def test_a_verb_is_one_file(tmp_path, monkeypatch, capsys):
    """A new module in the package is a verb, with no other change."""
    from simsiam import commands

    (tmp_path / "greet.py").write_text(
        'HELP = "print a greeting"\n'
        'GROUP = "laboratory"\n'
        "def add_arguments(parser):\n"
        '    parser.add_argument("--name", default="world", help="whom to greet [world]")\n'
        "def run(options):\n"
        '    print(f"hello {options.name}")\n'
    )
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    assert "greet" in build_parser().format_help()
    assert main(["greet", "--name", "you"]) == 0
    assert capsys.readouterr().out == "hello you\n"
    assert main(["gret"]) == 2 and "did you mean 'greet'?" in capsys.readouterr().err
    sys.modules.pop("simsiam.commands.greet")
