"""The subcommands read as one program: options of one name, meaning and default; help that shows them; one line for mistakes."""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import trim_plugin
from trim_plugin import cli
from trim_plugin.commands import COMMANDS, UserError, common
from trim_plugin.config import DEFAULT_KEPT_SHARE
from trim_plugin.embedded import examples

WITH_MODEL = ("demo", "generate", "batch", "eval")


@pytest.fixture(scope="module")
def options():
    """The actions of every subcommand, by option."""
    subparsers = argparse.ArgumentParser().add_subparsers()
    for name in COMMANDS:
        importlib.import_module(f"trim_plugin.commands.{name}").add_parser(subparsers)
    return {
        name: {option: action for action in parser._actions for option in action.option_strings}
        for name, parser in subparsers.choices.items()
    }


def test_an_option_means_the_same_everywhere(options):
    shared = {option for own in options.values() for option in own} - {"-h", "--help", "--out"}
    for option in shared:
        actions = {name: own[option] for name, own in options.items() if option in own}
        assert len({tuple(action.choices or ()) for action in actions.values()}) == 1, option
        if option not in ("--top-k-ratio", "--kept-share", "--weights", "--prompt"):
            assert len({repr(action.default) for action in actions.values()}) == 1, option
        among_models = [actions[name] for name in WITH_MODEL if name in actions]
        if option != "--prompt":  # demo has questions of its own
            assert len({(repr(action.default), action.dest, action.metavar) for action in among_models}) <= 1, option


def options_of(parser):
    return {option for action in parser._actions for option in action.option_strings}


def test_every_rule_is_an_option_of_every_command_that_generates(options):
    shared = options_of(common.generation_options())
    assert {"--top-k-ratio", "--kept-share", "--radius", "--no-merge", "--kv-quantization", "--tower-share"} <= shared
    assert {"--model", "--weights", "--adapter", "--device", "--max-new-tokens"} <= shared
    for name in WITH_MODEL:
        assert shared <= set(options[name]), name
    assert shared - {"--max-new-tokens"} <= set(options["serve"])
    of_models = options_of(common.model_options())
    assert of_models | {"--kept-share", "--radius", "--tower-share", "--image"} <= set(options["encode"])
    assert {"--weights", "--kv-quantization", "--max-new-tokens", "--top-k-ratio"} <= set(options["plan"])


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_shown_and_the_model_is_the_first_word_everywhere(name, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert COMMANDS[name] in shown
    assert "[MODEL]" in shown.partition("positional arguments")[0]
    required = {
        "eval": ["--data", "."],
        "batch": ["--questions", "x", "--out", "y"],
        "encode": ["--image", "x", "--out", "y"],
    }
    more = required.get(name, ["--prompt", "x"] if name == "generate" else [])
    for words in (["a", *more, "--model", "b"], ["--model", "a", *more, "--model", "b"]):
        assert cli.main([name, *words]) == 2
        assert "the model is given twice: a and b" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["demo", "generate", "encode"])
def test_pictures_are_given_in_a_row_or_one_by_one(name, options):
    parsed = {}
    for words in (["--image", "a", "b"], ["--image", "a", "--image", "b"]):
        parser = argparse.ArgumentParser()
        parser._add_action(options[name]["--image"])
        parsed[tuple(words)] = parser.parse_args(words).image
    assert list(parsed.values()) == [["a", "b"], ["a", "b"]]


def test_no_option_may_be_cut_short(capsys):
    """`--pictures` of batch would be taken for --pictures-cache."""
    assert cli.main(["batch", "--questions", "x", "--out", "y", "--pictures", "z"]) == 2
    assert "unrecognized arguments: --pictures" in capsys.readouterr().err


def test_every_default_is_in_the_help(options):
    for name, own in options.items():
        for option, action in own.items():
            if option not in ("-h", "--help") and not action.required and action.help != argparse.SUPPRESS:
                assert "default: " in action.help, (name, option)
                if action.default not in (None, False, []):
                    assert "%(default)s" in action.help, (name, option)


def test_the_weights_are_the_loaders(options):
    from trim_plugin.integrations.accelerate import WEIGHTS

    assert sorted(common.WEIGHT_FORMATS) == sorted(WEIGHTS)


@pytest.mark.parametrize("name", ["demo", "eval"])
def test_what_is_compared_by_default_has_the_packages_default_in_it(name, options):
    shares = importlib.import_module(f"trim_plugin.commands.{name}").DEFAULT_SHARES
    assert DEFAULT_KEPT_SHARE in shares
    shown = re.search(r"default: (.*), if no rule is given\)", options[name]["--kept-share"].help)[1]
    assert shown.split(" and ") == [str(share) for share in shares]


def test_the_version(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert re.fullmatch(
        rf"trim-plugin {re.escape(trim_plugin.__version__)} \(transformers \S+, torch \S+\)\n", capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "words", [[], ["nonsense"], ["plan", "--weights", "int3"], ["plan", "--batch", "x"], ["generate"]]
)
def test_a_wrong_call_is_one_line_and_2(words, capsys):
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"trim-plugin {words[0]}: " if words and words[0] in COMMANDS else "trim-plugin: ")
    assert "--help shows what there is" in line


@pytest.mark.parametrize(
    ("words", "more"),
    [
        ("plan", ""),
        ("eval --data x", "; the same command goes on where it stopped"),
        ("batch --questions x --out y", "; the same command goes on where it stopped"),
    ],
)
def test_an_interruption_is_one_line_and_130(words, more, capsys, monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    name, *options = words.split()
    monkeypatch.setattr(importlib.import_module(f"trim_plugin.commands.{name}"), "run", interrupted)
    try:
        assert cli.main([name, *options]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.splitlines() == [f"trim-plugin {name}: interrupted{more}"]


def test_ctrl_c_while_answering(tmp_path):
    """As a user does it, in a process of its own, once the first answer is there; the same command then goes on."""
    example = examples()[0]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(example.picture.read_bytes())
    line = '{"picture": "a.png", "question": "Read all digits."}\n'
    (tmp_path / "data" / "questions.jsonl").write_text(line * 2000)
    command = [
        sys.executable,
        *["-m", "trim_plugin.cli", "eval", "--data", "data", "--out", "out", "--top-k-ratio", "0.5"],
    ]
    # A shell's background jobs ignore Ctrl-C, and so would what the tests start there.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True, preexec_fn=heed)
    log = tmp_path / "out" / "answers-0.jsonl"
    while process.poll() is None and not (log.is_file() and log.stat().st_size):
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 130
    assert error.splitlines() == [
        "trim-plugin eval: loading small ...",
        "trim-plugin eval: interrupted; the same command goes on where it stopped",
    ]


def test_a_warning_is_one_line(capsys, monkeypatch):
    import warnings

    def warning(arguments):
        warnings.warn("two pictures\nand more", UserWarning, stacklevel=1)
        warnings.warn("a library to another", FutureWarning, stacklevel=1)
        raise UserError("the end")

    monkeypatch.setattr(importlib.import_module("trim_plugin.commands.plan"), "run", warning)
    assert cli.main(["plan"]) == 2
    assert capsys.readouterr().err.splitlines() == ["trim-plugin plan: two pictures", "trim-plugin plan: the end"]


def test_a_reader_that_goes_away_is_no_traceback():
    command = f"{sys.executable} -m trim_plugin.cli plan --json | head -c 1"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert result.stdout == "{"
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr
