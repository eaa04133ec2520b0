"""One table names the formats; whoever needs to know reads it."""

import pytest
import torch

from trim_plugin import TrimConfig
from trim_plugin.cli import main
from trim_plugin.compat import cache_of
from trim_plugin.kv_formats import BLOCK, KV_FORMATS, FourBits
from trim_plugin.planning.model_sizes import cross_kv_bytes

from .random_models import Sample, generate, random_inputs, trimmed


@pytest.mark.parametrize("name", KV_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_come_back_and_take_as_many_bytes_as_the_planner_counts(name, dtype):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    rows = torch.randn(2, 5, 3 * BLOCK).to(dtype)
    rows[0, 0, :BLOCK] *= 1000  # a block has a scale of its own
    made = KV_FORMATS[name].quantize(rows)
    back = KV_FORMATS[name].dequantize(made, dtype)
    assert (back.shape, back.dtype) == (rows.shape, dtype)
    errors = (back - rows).float().unflatten(-1, (3, BLOCK)).norm(dim=-1)
    assert (errors <= 0.15 * rows.float().unflatten(-1, (3, BLOCK)).norm(dim=-1)).all()
    assert made.codes.nbytes + made.scales.nbytes == 2 * 5 * KV_FORMATS[name].token_bytes(3 * BLOCK)


def test_a_part_of_a_block_takes_a_whole_one():
    assert KV_FORMATS["int8"].token_bytes(1) == KV_FORMATS["int8"].token_bytes(BLOCK) == BLOCK + 4


def test_a_new_format_is_one_entry(model, monkeypatch, capsys):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="kv_quantization must be one of None, 'int8', 'nf4', got 'fp4'"):
        TrimConfig(kv_quantization="fp4")
    monkeypatch.setitem(KV_FORMATS, "fp4", FourBits("fp4"))
    inputs = random_inputs(model, [Sample((1, (6,), 5))])
    for more in ({}, {"static": True, "static_bucket": 4}):
        output = trimmed(model, inputs, {"top_k_ratio": 1.0, "kv_quantization": "fp4", **more}, 3)
        assert output.sequences.shape == generate(model, inputs, 3).sequences.shape
        planned = cross_kv_bytes(model.config, 1, 20, "fp4")
        assert cache_of(output).report().cross_kv_bytes == planned
    assert main(["plan", "--kv-quantization", "fp4", "--json"]) == 0
    assert '"kv_quantization": "fp4"' in capsys.readouterr().out
    for command in ("eval", "generate"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "fp4" in capsys.readouterr().out.split("--kv-quantization")[1][:40]
