import json

import pytest

from trim_plugin.cli import main
from trim_plugin.commands.plan import parse_bytes

from ..random_models import random_config


def printed_json(capsys, *options):
    assert main(["plan", *options, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_prints_json(capsys, tmp_path):
    random_config().save_pretrained(tmp_path)
    printed = printed_json(
        capsys, "--model", str(tmp_path), "--memory", "20MiB", "--reserve", "0", "--kept-share", "0.5"
    )
    assert [way["name"] for way in printed["ways"]] == ["stock", "exact", "trimmed"]
    assert printed["ways"][2]["kept_tokens"] == 10
    assert printed["ways"][0]["largest_batch"] > 0
    assert all(way["fits"] and way["change"] is None for way in printed["ways"])
    assert printed["ways"][0]["peak"] == max(printed["ways"][0][f"{phase}_peak"] for phase in ("prefill", "decode"))


def test_without_memory_nothing_is_said_about_what_fits(capsys):
    assert not {"largest_batch", "fits"} & set(printed_json(capsys)["ways"][0])


def test_options_reach_the_plan(capsys):
    def peak(*options, phase=""):
        return printed_json(capsys, *options)["ways"][2][phase + "peak"]

    plain = peak("--batch", "64")
    for options in (["--copies", "2"], ["--images", "2"], ["--max-new-tokens", "999"], ["--prompt-tokens", "999"]):
        assert peak("--batch", "64", *options) > plain
    for options in (
        ["--kv-quantization", "nf4"],
        ["--weights", "nf4"],
        ["--kept-share", "0.1"],
        ["--top-k-ratio", "0.1"],
        ["--tiles", "1"],
        ["--images", "1", "--interleaved", "--tiles", "3"],
    ):
        assert peak("--batch", "64", *options) < plain
    assert peak("--batch", "64", "--pixels-on-device") > plain
    whole, pieces = (peak("--prefill-pictures", n, "--batch", "8", phase="prefill_") for n in ("8", "1"))
    assert pieces < whole
    untouched, merged = (
        peak("--batch", "8", "--tiles", "1", "--kept-share", "0.1", *share, phase="prefill_")
        for share in ((), ("--tower-share", "0.5"))
    )
    assert merged < untouched


def test_the_command_prints_a_table(capsys):
    assert main(["plan", "--tiles", "1", "--weights", "nf4"]) == 0
    printed = capsys.readouterr().out
    assert "200.1 MiB" in printed
    assert "50.0 MiB" in printed
    assert "largest batch" not in printed


def test_several_ratios_stand_in_one_table_and_what_would_fit_is_said(capsys):
    options = ["--top-k-ratio", "0.25", "0.1", "--memory", "24GiB", "--batch", "250", "--weights", "nf4"]
    assert main(["plan", *options]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "trimmed 0.25" in printed
    assert "trimmed 0.1" in printed
    assert "ratio 0.25 keeps 61 %, 0.1 keeps 25 %" in printed
    assert "batch 250 fits with --kv-quantization" in printed
    again = ["plan", "--top-k-ratio", "0.25", "--top-k-ratio", "0.1", "--memory", "24GiB", "--weights", "nf4"]
    assert main(again) == 0
    assert "trimmed 0.1" in capsys.readouterr().out


def test_a_zero_comes_with_its_reason(capsys):
    assert main(["plan", "--memory", "12GiB"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "stock, exact, trimmed: not even one sample fits: the weights take 19.87 GiB" in printed
    assert "exact, trimmed: batch 1 fits with --weights nf4" in printed


def test_what_nothing_can_make_fit_is_said(capsys):
    assert main(["plan", "--memory", "24GiB", "--batch", "100000"]) == 0
    assert "no change makes batch 100000 fit" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory", "24 apples"], "--memory must look like 24GiB"),
        (["--memory", "24"], "--memory needs a unit: 24GiB, 24GB or 24MiB, got 24"),
        (["--memory", "0GiB"], "--memory must be more than nothing"),
        (["--reserve", "1"], "--reserve needs a unit"),
        (["--model", "/nowhere/at/all"], "cannot load"),
        (["--tiles", "9"], "tiles must be at most 4"),
        (["--top-k-ratio", "7"], "--top-k-ratio must be a number"),
        (["--kept-share", "0"], "--kept-share must be a number"),
        (["--batch", "0"], "batch must be a positive integer"),
        (["--tower-share", "0"], "--tower-share must be a number"),
        (["--prefill-pictures", "0"], "--prefill-pictures must be at least 1"),
    ],
)
def test_wrong_options_end_with_2_and_one_line(options, message, capsys):
    assert main(["plan", *options]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_bytes_are_read_with_units():
    assert [parse_bytes(text) for text in ("1GiB", "2 GB", "3mib", "4b")] == [2**30, 2 * 10**9, 3 * 2**20, 4]
