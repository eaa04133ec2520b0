import json

import pytest

from trim_plugin.cli import main
from trim_plugin.commands.plan import parse_bytes

from ..random_models import random_config


def test_the_command_prints_json(capsys, tmp_path):
    random_config().save_pretrained(tmp_path)
    assert main(["plan", "--model", str(tmp_path), "--memory", "20MiB", "--kept-share", "0.5", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [way["name"] for way in printed["ways"]] == ["stock", "exact", "trimmed"]
    assert printed["ways"][2]["kept_tokens"] == 10
    assert printed["fits"]["stock"]["side_by_side"] > 0


def test_the_command_prints_a_table(capsys):
    assert main(["plan", "--tiles", "1", "--weights", "nf4"]) == 0
    printed = capsys.readouterr().out
    assert "200.1 MiB" in printed
    assert "50.0 MiB" in printed
    assert "largest batch" not in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory", "24 apples"], "--memory must look like 24GiB"),
        (["--model", "/nowhere/at/all"], "cannot load"),
        (["--tiles", "9"], "tiles must be at most 4"),
        (["--top-k-ratio", "7"], "--top-k-ratio must be a number"),
        (["--batch", "0"], "batch must be a positive integer"),
    ],
)
def test_wrong_options_end_with_2_and_one_line(options, message, capsys):
    assert main(["plan", *options]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_bytes_are_read_with_units():
    assert [parse_bytes(text) for text in ("1GiB", "2 GB", "3mib", "4")] == [2**30, 2 * 10**9, 3 * 2**20, 4]
