import torch

from ..random_models import PAIR, Sample, generate, prefilled, random_inputs, trimmed


def test_report_counts_tensors(model):
    _, cache = prefilled(model, PAIR)
    report = cache.report()
    held = sum(cache.layers[index].keys.nbytes + cache.layers[index].values.nbytes for index in (1, 3))
    assert report.cross_kv_bytes == held
    assert report.total_tokens == [20, 20]
    assert report.visible_tokens == [20, 5]
    assert report.kept_tokens == [len(kept) for kept in cache.kept_indices]
    stock = model(**random_inputs(model, PAIR), use_cache=True).past_key_values
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
    cache = ours.past_key_values
    assert [kept.numel() for kept in cache.kept_indices] == [0, 0]
    report = cache.report()
    assert (report.total_tokens, report.visible_tokens, report.kept_tokens) == ([0, 0], [0, 0], [0, 0])
    assert (report.cross_kv_bytes, report.stock_cross_kv_bytes) == (0, 0)
    assert report.self_kv_bytes > 0
    assert "no visual tokens" in str(report)
