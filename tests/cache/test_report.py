import pytest
import torch

from trim_plugin.cache.report import TrimReport, format_bytes, held_bytes
from trim_plugin.compat import cache_of

from ..random_models import PAIR, Sample, generate, prefilled, random_inputs, trimmed


def test_report_counts_tensors(model):
    _, cache = prefilled(model, PAIR)
    report = cache.report()
    of_a_token = 2 * 2 * 8 * 4  # keys and values, two heads of eight float32
    kept = [len(indices) for indices in cache.kept_indices]
    assert kept[1] < kept[0] * 7 / 8  # so each lies in a tensor of its own, and nothing is padding
    assert report.cross_kv_bytes == 2 * sum(kept) * of_a_token
    assert report.total_tokens == [20, 20]
    assert report.visible_tokens == [20, 5]
    assert report.kept_tokens == [len(kept) for kept in cache.kept_indices]
    stock = cache_of(model(**random_inputs(model, PAIR), use_cache=True))
    assert report.stock_cross_kv_bytes == sum(
        stock.layers[index].keys.nbytes + stock.layers[index].values.nbytes for index in (1, 3)
    )
    assert report.self_kv_bytes == sum(
        stock.layers[index].keys.nbytes + stock.layers[index].values.nbytes for index in (0, 2, 4)
    )
    assert "of stock" in str(report)


def test_text_only(model):
    inputs = random_inputs(model, [Sample((6,)), Sample((3,))])
    ours = trimmed(model, inputs, {"top_k_ratio": 0.1})
    assert torch.equal(ours.sequences, generate(model, inputs).sequences)
    cache = cache_of(ours)
    assert [kept.numel() for kept in cache.kept_indices] == [0, 0]
    report = cache.report()
    assert (report.total_tokens, report.visible_tokens, report.kept_tokens) == ([0, 0], [0, 0], [0, 0])
    assert (report.cross_kv_bytes, report.stock_cross_kv_bytes) == (0, 0)
    assert report.self_kv_bytes > 0
    assert "no visual tokens" in str(report)


def test_a_view_holds_its_whole_storage_and_every_storage_counts_once():
    whole = torch.zeros(4, 10)
    assert held_bytes([whole[0], whole[1:], None]) == 160
    assert held_bytes([whole[0].clone(), whole]) == 200
    assert held_bytes([]) == 0


def test_shares_are_of_the_whole_batch():
    report = TrimReport([20, 20], [20, 5], [5, 5], 30, 120, 8)
    assert report.kept_share == 10 / 25
    assert report.cross_kv_ratio == 0.25
    lines = str(report).splitlines()
    assert lines[0].startswith("sample 0, visual tokens: 5 kept of 20 visible (25.0 %)")
    assert lines[1].startswith("sample 1, visual tokens: 5 kept of 5 visible (100.0 %)")


def test_pictures_that_no_row_reads_are_said_to_be_unread():
    report = TrimReport([20], [0], [0], 0, 120, 8)
    assert report.kept_share == 0.0
    assert "(no text row reads them)" in str(report)


@pytest.mark.parametrize(
    ("count", "text"), [(1023, "1023 B"), (1024, "1.0 KiB"), (2**20 - 1, "1024.0 KiB"), (2**30, "1.00 GiB")]
)
def test_bytes_change_their_unit_at_1024(count, text):
    assert format_bytes(count) == text


def test_a_notebook_shows_a_table():
    html = TrimReport([6404, 6404], [1601, 6404], [600, 2312], 2**20, 4 * 2**20, 2**10)._repr_html_()
    assert "<tr><td>1</td><td>2,312</td><td>6,404</td><td>6,404</td></tr>" in html
    assert "1.0 MiB instead of 4.0 MiB (25.0 % of stock)" in html
    assert "<th>kept</th>" in html
    assert TrimReport([0], [0], [0], 0, 0, 2**10)._repr_html_() == (
        "<p>no visual tokens</p><p>Self-attention KV: 1.0 KiB</p>"
    )
