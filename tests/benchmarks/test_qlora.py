"""The benchmark that teaches an adapter a question: what it trains on, and that all of it works on."""

import argparse
import json
import shutil

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from benchmarks.qlora import run as qlora
from benchmarks.small_model import pages
from benchmarks.small_model.architecture import build_tokenizer
from benchmarks.small_model.pages.questions import UNTRAINED_TYPES, ask
from benchmarks.small_model.pages.scenes import draw_page
from benchmarks.small_model.tasks import DIGITS, PAGES
from trim_plugin.embedded import load_small_model
from trim_plugin.integrations.peft import lora_config


def options(**more):
    return argparse.Namespace(**{"kind": "largest", "replay": 0.5, "batch": 6, "about": 3} | more)


def test_a_picture_that_is_read_once_gives_the_loss_of_one_read_for_every_question():
    model, processor = load_small_model()
    model = get_peft_model(model, lora_config("text_linear", rank=2))
    batch, pictures = qlora.training_batch(processor, DIGITS, 0, options())
    assert len(pictures["pixel_values"]) == 2
    shared = qlora.loss_of(model, batch, pictures, 3)
    repeated = {name: tensor.repeat_interleave(3, dim=0) for name, tensor in pictures.items()}
    assert torch.allclose(shared, model(**batch, **repeated).loss, atol=1e-6)
    assert not torch.allclose(
        shared, model(**batch, **{name: t.flip(0) for name, t in repeated.items()}).loss, atol=1e-3
    )
    shared.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("model", "task", "kind"), [("small", DIGITS, "largest"), ("pages", PAGES, "last")])
def test_training_asks_for_the_new_and_replays_the_known(model, task, kind):
    processor = load_small_model()[1] if model == "small" else pages.load()[1]

    def asked(replay):
        batch, _ = qlora.training_batch(processor, task, 1, options(kind=kind, replay=replay, batch=12))
        return [kind in text for text in processor.tokenizer.batch_decode(batch["input_ids"])]

    assert all(asked(0.0))
    assert not any(asked(1.0))
    assert 0 < sum(asked(0.5)) < 12


@pytest.mark.parametrize("seed", range(5))
def test_what_pages_is_not_trained_for_is_answered_truly_in_the_tokenizers_words(seed):
    page, tokenizer = draw_page(seed, held_out=True), build_tokenizer()
    assert UNTRAINED_TYPES == PAGES.untrained == ("last",)
    question, answer = ask(page, "last", np.random.default_rng(seed))
    assert question == "What is the last number?"
    lowest = max(page.lines, key=lambda line: line.digit_boxes[0][3])
    assert answer.replace(" ", "") == lowest.number
    assert tokenizer.unk_token_id not in tokenizer(f"{question} {answer}", add_special_tokens=False).input_ids


def test_a_run_writes_adapter_results_and_readme_and_a_seed_repeats_it(tmp_path):
    pytest.importorskip("bitsandbytes")
    given = ["--steps", "2", "--batch", "3", "--questions", "2", "--rank", "2", "--threads", "1"]
    for name in ("one", "two"):
        qlora.main([*given, "--out", str(tmp_path / name), "--results", str(tmp_path)])
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(tensor.abs().max() > 0 for key, tensor in one.items() if "lora_B" in key)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["training"]["steps"] == 2
    ways = results["ways"]
    assert list(ways["base"]) == ["largest", "colour"]
    assert ways["adapted"]["largest"]["kept_share"] == 1.0
    assert 0.3 < ways["adapted, trimmed"]["largest"]["kept_share"] < 0.4
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "## The small model" in readme
    assert "## The model that reads pages" not in readme
    assert '| nf4 model | new: "largest" | old: "colour" |' in readme


@pytest.mark.parametrize(
    ("given", "said"),
    [(["--kind", "last"], "--kind last: this model's scenes are asked for largest, smallest"),
     (["--batch", "5"], "--batch 5 is not a multiple of --about 3")],
)  # fmt: skip
def test_what_cannot_be_is_said_before_any_work(given, said, tmp_path, capsys):
    with pytest.raises(SystemExit):
        qlora.main([*given, "--out", str(tmp_path)])
    assert said in capsys.readouterr().err


def test_the_page_is_of_the_results_beside_it(tmp_path):
    kept = sorted(qlora.HERE.glob("results*.json"))
    assert [path.name for path in kept] == ["results-fine.json", "results-pages.json", "results.json"]
    for path in kept:
        shutil.copy(path, tmp_path)
    qlora.write_readme(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == (qlora.HERE / "README.md").read_text(
        encoding="utf-8"
    )
