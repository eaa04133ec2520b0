import importlib
import sys
from types import ModuleType

import pytest

from trim_plugin.cli import main
from trim_plugin.commands import COMMANDS, UserError


@pytest.mark.parametrize("name", COMMANDS)
def test_every_subcommand_is_one_line_and_its_module(name, capsys):
    module = importlib.import_module(f"trim_plugin.commands.{name}")
    assert callable(module.run)
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"trim-plugin {name}" in capsys.readouterr().out


def test_help_names_every_subcommand(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f"{name} {summary}" in shown for name, summary in COMMANDS.items())


@pytest.mark.parametrize("words", [[], ["frobnicate"], ["plan", "--frobnicate"]])
def test_words_that_mean_nothing_end_with_2(words, capsys):
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith("trim-plugin")
    assert told.count("\n") == 1


def subcommand(monkeypatch, run):
    """A subcommand "own" that does this."""
    module = ModuleType("trim_plugin.commands.own")
    module.add_parser = lambda subparsers: subparsers.add_parser("own").set_defaults(run=run)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(COMMANDS, "own", "of one's own")


def test_a_subcommand_needs_no_further_place(monkeypatch):
    ran = []
    subcommand(monkeypatch, ran.append)
    assert main(["own"]) == 0
    assert len(ran) == 1


def test_what_the_user_can_mend_is_one_line_and_other_errors_are_not_hidden(monkeypatch, capsys):
    def mendable(_arguments):
        raise UserError("give a picture")

    subcommand(monkeypatch, mendable)
    assert main(["own"]) == 2
    assert capsys.readouterr().err == "trim-plugin own: give a picture\n"

    def broken(_arguments):
        raise ZeroDivisionError

    subcommand(monkeypatch, broken)
    with pytest.raises(ZeroDivisionError):
        main(["own"])
