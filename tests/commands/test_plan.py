import json
import re
import subprocess
import sys

import pytest

from benchmarks.common.models import transformers_config
from trim_plugin.cli import main

from ..random_models import random_config


def printed_json(capsys, *options):
    assert main(["plan", *options, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_prints_json(capsys, tmp_path):
    random_config().save_pretrained(tmp_path)
    printed = printed_json(capsys, str(tmp_path), "--memory", "20MiB", "--reserve", "0", "--expect-kept", "0.5")
    assert [way["name"] for way in printed["ways"]] == ["stock", "exact", "trimmed"]
    assert printed["ways"][2]["kept_tokens"] == 10
    assert printed["ways"][0]["largest_batch"] > 0
    assert all(way["fits"] for way in printed["ways"])
    assert printed["ways"][0]["peak"] == max(printed["ways"][0][f"{phase}_peak"] for phase in ("prefill", "decode"))


def test_without_memory_nothing_is_said_about_what_fits(capsys):
    assert not {"largest_batch", "fits"} & set(printed_json(capsys)["ways"][0])


def test_options_reach_the_plan(capsys):
    def peak(*options, phase=""):
        return printed_json(capsys, *options)["ways"][2][phase + "peak"]

    plain = peak("--batch", "64")
    more = ("--copies 2", "--expand-size 2", "--images 2", "--max-new-tokens 999", "--prompt-tokens 999")
    for options in (*more, "--pixels-on-device"):
        assert peak("--batch", "64", *options.split()) > plain, options
    less = ("--kv-quantization nf4", "--weights nf4", "--expect-kept 0.1", "--top-k-ratio 0.1", "--tiles 1")
    for options in (*less, "--images 1 --interleaved --tiles 3"):
        assert peak("--batch", "64", *options.split()) < plain, options
    whole, pieces = (peak("--prefill-pictures", n, "--batch", "8", phase="prefill_") for n in ("8", "1"))
    assert pieces < whole
    untouched, merged = (
        peak("--batch", "8", "--tiles", "1", "--expect-kept", "0.1", *share, phase="prefill_")
        for share in ((), ("--tower-share", "0.5"))
    )
    assert merged < untouched


def test_the_command_prints_a_table(capsys):
    assert main(["plan", "--tiles", "1", "--weights", "nf4"]) == 0
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.startswith(("stock", "exact"))}
    assert rows["stock"][:2] == ["6404", "0.20"]  # 200.1 MiB, and a quarter of it
    assert rows["exact"][:2] == ["1601", "0.05"]
    assert "largest" not in printed


def test_several_ratios_stand_in_one_table_and_what_fits_is_said(capsys):
    options = ["--top-k-ratio", "0.25", "0.1", "--memory", "24GiB", "--batch", "150", "--weights", "nf4"]
    assert main(["plan", *options]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "ratio 0.25 keeps 61%, 0.1 keeps 25%" in printed
    assert "Batch 150 fits into 24.00 GiB with trimmed 0.1. It does not with stock, exact, trimmed 0.25." in printed
    assert "limited by prefill (stock); cross KV (exact, trimmed 0.25, trimmed 0.1)" in printed
    again = ["plan", "--top-k-ratio", "0.25", "--top-k-ratio", "0.1", "--memory", "24GiB", "--weights", "nf4"]
    assert main(again) == 0
    assert "trimmed 0.1" in capsys.readouterr().out


def test_weights_that_do_not_fit_are_said_and_what_would(capsys):
    assert main(["plan", "--memory", "12GiB"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Not even one sample fits (stock, exact, trimmed): the weights alone take 19.87 GiB in bf16" in printed
    assert "They fit in nf4 (6.73 GiB), or spread over devices of this size: at least 2 in bf16." in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory", "24 apples"], "--memory must look like 24GiB"),
        (["--memory", "24"], "--memory needs a unit: 24GiB, 24GB or 24MiB, got 24"),
        (["--memory", "0GiB"], "--memory must be more than nothing"),
        (["--memory", "0.1B"], "--memory must be more than nothing"),
        (["--memory", "9" * 400 + "GiB"], "--memory must look like 24GiB"),
        (["--reserve", "1"], "--reserve needs a unit"),
        (["--model", "/nowhere/at/all"], "cannot load"),
        (["--tiles", "9"], "tiles must be at most 4"),
        (["--tiles", "1", "9"], "tiles must be at most 4"),
        (["--top-k-ratio", "7"], "--top-k-ratio must be a number"),
        (["--expect-kept", "0"], "--expect-kept must be a number"),
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
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize(
    "content", ["{", '{"model_type": "llama"}', "[]", '{"model_type": "mllama", "text_config": 3}']
)
def test_a_folder_that_is_no_mllama_model(content, tmp_path, capsys):
    (tmp_path / "config.json").write_text(content)
    assert main(["plan", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_a_folder_is_planned_as_its_shape_is(tmp_path, capsys):
    """A folder's JSON says what the built-in shape does: the same plan."""
    transformers_config("11b").save_pretrained(tmp_path)
    built_in, folder = (
        printed_json(capsys, model, "--memory", "24GiB", "--weights", "nf4") for model in ("11b", str(tmp_path))
    )
    assert built_in["ways"] == folder["ways"]


def test_a_plan_loads_neither_torch_nor_transformers(tmp_path):
    """In a process of its own, with a built-in shape and with a folder; nor does a slip load them."""
    random_config().save_pretrained(tmp_path)
    for options in (["--memory", "24GiB"], [str(tmp_path), "--json"], ["small"], ["--memory", "24"], ["/nowhere"]):
        program = (
            "import sys; from trim_plugin.cli import main\n"
            f"main(['plan', *{options!r}])\n"
            "print([name for name in ('torch', 'transformers', 'numpy', 'PIL') if name in sys.modules], file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.stderr.splitlines()[-1] == "[]", done.stderr


def test_what_a_size_was_taken_for_is_said(capsys):
    assert main(["plan", "--memory", "24GB"]) == 0
    printed = capsys.readouterr()
    assert "--memory 24GB is 24,000,000,000 bytes, which is 22.35 GiB" in printed.err
    assert "has 24GiB" in printed.err
    assert "fits into 22.35 GiB" in " ".join(printed.out.split())
    assert main(["plan", "--memory", "24GiB", "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert json.loads(printed.out)["memory"] == 24 * 2**30
    assert main(["plan", "--memory", "24gb", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"] == 24 * 10**9


def test_the_rule_and_a_forecast_of_as_much_plan_the_same_and_the_rule_is_the_default(capsys):
    rule, forecast, default = (
        printed_json(capsys, *words) for words in (["--kept-share", "0.35"], ["--expect-kept", "0.35"], [])
    )
    assert rule == forecast == default
    assert default["ways"][2]["kept_share"] == 0.35
    ratio = printed_json(capsys, "--top-k-ratio", "0.15", "--batch", "8")["ways"][2]
    assert "cross_kv" in ratio["upper_bounds"]
    assert "cross_kv" not in printed_json(capsys, "--batch", "8")["ways"][2]["upper_bounds"]


def test_samples_of_different_tiles_make_the_batch(capsys):
    mixed = printed_json(capsys, "--tiles", "1", "1", "1", "4", "--memory", "24GiB", "--weights", "nf4")
    assert mixed["job"]["batch"] == 4
    assert mixed["job"]["tiles"] == [1, 1, 1, 4]
    assert "needed" in mixed["ways"][1]["upper_bounds"]
    assert printed_json(capsys, "--tiles", "1", "1", "1", "4", "--batch", "8")["job"]["batch"] == 8
    assert main(["plan", "--tiles", "1", "1", "1", "4"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^exact .*≤", printed, re.MULTILINE)
    assert not re.search(r"^stock .*≤", printed, re.MULTILINE)
    assert "≤: at most" in printed


@pytest.mark.parametrize(
    "options", [[], ["--memory", "80GiB"], ["--memory", "24GiB", "--weights", "nf4", "--batch", "1000"]]
)
@pytest.mark.parametrize("model", ["11b", "90b", "small"])
def test_three_ratios_are_read_at_80_columns(model, options, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["plan", model, "--top-k-ratio", "0.25", "0.15", "0.1", "--tiles", "4", "4", "4", "1", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    rows = {
        line[:14].strip(): line[14:].split() for line in lines if re.match(r"(stock|exact|trimmed \S+) +\d+ ", line)
    }
    assert list(rows) == ["stock", "exact", "trimmed 0.25", "trimmed 0.15", "trimmed 0.1"]
    assert {len(cells) for cells in rows.values()} == {7 if "--memory" in options else 6}
