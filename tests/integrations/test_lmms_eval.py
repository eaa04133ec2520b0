"""The lmms-eval model, against lmms-eval's own classes where it is installed, else against a stand-in for its interface."""

import importlib.util
import json
import sys
import types

import pytest
from PIL import Image

from trim_plugin.embedded import SMALL_MODEL, examples
from trim_plugin.integrations import lmms_eval_manifest, lmms_eval_table

REAL = importlib.util.find_spec("lmms_eval") is not None
TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
task: digits
test_split: test
output_type: generate_until
doc_to_visual: !function digits.doc_to_visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 8}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: [{{version: 0.0}}]
"""
VISUAL = """
from PIL import Image


def doc_to_visual(doc):
    return [Image.open(doc["picture"])]
"""


@pytest.fixture
def adapter(monkeypatch):
    """The adapter's module."""
    if not REAL:

        class Hook:
            def add_partial(self, attr, req, res):
                pass

        class Base:
            def __init__(self):
                self._rank, self._world_size = 0, 1
                self.cache_hook, self.task_dict = Hook(), {}

            rank = property(lambda self: self._rank)
            world_size = property(lambda self: self._world_size)

        api = types.ModuleType("lmms_eval.api.model")
        api.lmms = Base
        for name, module in {
            "lmms_eval": types.ModuleType("lmms_eval"),
            "lmms_eval.api": types.ModuleType("lmms_eval.api"),
            "lmms_eval.api.model": api,
        }.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delitem(sys.modules, "trim_plugin.integrations.lmms_eval", raising=False)
    return importlib.import_module("trim_plugin.integrations.lmms_eval")


def make(adapter, **settings):
    return adapter.LlamaVisionTrimmed(pretrained=str(SMALL_MODEL), device="cpu", dtype="float32", **settings)


def requests(model, settings=None):
    """A request for each shipped picture, and their documents on the model, as lmms-eval's evaluator puts them."""
    documents = [{"picture": example.picture} for example in examples()]
    model.task_dict = {"digits": {"test": documents}}

    def visual(document):
        return [Image.open(document["picture"])]

    return [
        types.SimpleNamespace(
            args=(example.question, settings or {"max_new_tokens": 8}, visual, index, "digits", "test")
        )
        for index, example in enumerate(examples())
    ]


def test_batches_answer_as_single_questions_do(adapter):
    answers = {}
    for size in (1, 3):
        model = make(adapter, top_k_ratio=0.25, batch_size=size)
        answers[size] = model.generate_until(requests(model))
    assert answers[1] == answers[3]
    assert all(answers[1])


def test_exact_answers_are_stocks(adapter, tmp_path):
    stock, exact = (
        make(adapter, top_k_ratio=ratio, report_to=str(tmp_path / f"{ratio}.jsonl")) for ratio in ("stock", 1.0)
    )
    assert stock.generate_until(requests(stock)) == exact.generate_until(requests(exact))
    lines = [json.loads(line) for line in (tmp_path / "1.0.jsonl").read_text().splitlines()]
    assert len(lines) == len(examples())
    assert all(line["kept_tokens"] == line["visible_tokens"] for line in lines)


@pytest.mark.parametrize("size", [1, 3])
def test_several_questions_about_a_picture_run_the_tower_once(adapter, tmp_path, size):
    """Same answers and same tokens as when every question reads its picture anew."""
    found, lines, calls = {}, {}, {}
    for gib in (0, 1):
        model = make(adapter, top_k_ratio=0.25, batch_size=size, encoded_gib=gib, report_to=str(tmp_path / f"{gib}"))
        seen: list[int] = []
        model.model.model.vision_model.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
        )
        asked = requests(model)
        more = [types.SimpleNamespace(args=("Read all digits.", *one.args[1:])) for one in requests(model)]
        found[gib] = model.generate_until([*asked, *more])
        lines[gib] = [json.loads(line) for line in (tmp_path / f"{gib}").read_text().splitlines()]
        calls[gib] = sum(seen)
    assert found[0] == found[1]
    assert [line["kept_tokens"] for line in lines[0]] == [line["kept_tokens"] for line in lines[1]]
    assert calls == {0: 2 * len(examples()), 1: len(examples())}
    assert [sum(line["encoded"] for line in lines[gib]) for gib in (0, 1)] == [0, len(examples())]
    assert all(line["seconds"] > 0 for line in lines[1])


def test_questions_without_a_picture(adapter):
    for gib in (0, 1):
        model = make(adapter, top_k_ratio=0.25, encoded_gib=gib)
        first = requests(model)[0].args
        asked = types.SimpleNamespace(args=("How many digits are there?", first[1], lambda document: [], *first[3:]))
        assert len(model.generate_until([asked])) == 1


def test_arguments_are_checked(adapter):
    for settings, message in (
        ({"top_k_ratio": 0}, "top_k_ratio must be"),
        ({"top_k_ratio": "most"}, "'stock'"),
        ({"top_k_ratio": "stock", "kv_quantization": "int8"}, "needs a trimmed cache"),
        ({"kept_share": 1.5}, "kept_share must be"),
        ({"kept_share": 0.3, "top_k_ratio": 0.5}, "Choose one"),
        ({"batch_size": "auto"}, "batch_size must be"),
        ({"encoded_gib": -1}, "encoded_gib must be"),
        ({"encoded_gib": "much"}, "encoded_gib must be"),
        ({"colour": 1}, "Unknown model argument 'colour'"),
    ):
        with pytest.raises(ValueError, match=message):
            make(adapter, **settings)


def test_generation_settings_and_cutting(adapter):
    assert adapter.generation_settings({})["max_new_tokens"] == 1024
    assert adapter.generation_settings({"temperature": 0, "top_p": 1.0})["top_p"] is None
    assert adapter.generation_settings({"do_sample": True, "temperature": 0.5})["temperature"] == 0.5
    assert adapter.cut("seven ASSISTANT: eight", ["ASSISTANT:"]) == "seven "
    assert list(adapter.batches("aababb", lambda letter: letter, 2)) == [["a", "a"], ["b", "b"], ["a"], ["b"]]


def write_results(folder, model, arguments, value, date="2025-01-01"):
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "results": {"mmvp": {"alias": "mmvp", "mmvp_accuracy,none": value, "mmvp_accuracy_stderr,none": 0.1}},
        "config": {"model": model, "model_args": arguments},
        "date": date,
    }
    (folder / f"{date}_results.json").write_text(json.dumps(content))


def test_table_of_result_files(tmp_path, capsys):
    write_results(tmp_path / "a", "llama_vision_trimmed", "top_k_ratio=stock", 0.5)
    write_results(tmp_path / "b", "llama_vision_trimmed", "pretrained=x,top_k_ratio=0.25", 0.1)
    write_results(tmp_path / "b", "llama_vision_trimmed", "pretrained=x,top_k_ratio=0.25", 0.4, "2025-02-01")
    write_results(tmp_path / "c", "llama_vision_trimmed", "top_k_ratio=1.0", 0.5)
    write_results(tmp_path / "d", "llama_vision_trimmed", "pretrained=x,kept_share=0.3", 0.5)
    assert lmms_eval_table.main([str(tmp_path), "--out", str(tmp_path / "comparison")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| cache | mmvp: mmvp_accuracy |"
    assert lines[2:] == [
        "| stock | 0.5 |",
        "| exact | 0.5 (100.0 %) |",
        "| 0.25 | 0.4 (80.0 %) |",
        "| k-center 0.3 | 0.5 (100.0 %) |",
    ]
    with Image.open(tmp_path / "comparison.png") as picture:
        assert picture.size[0] > 500
    assert lmms_eval_table.main([str(tmp_path / "nothing"), "--out", str(tmp_path / "x")]) == 2


@pytest.mark.skipif(not REAL, reason="lmms-eval is not installed")
def test_evaluator_runs_trimmed_and_stock(tmp_path, capsys):
    """A local task through lmms-eval's registry, task manager, evaluator and result files."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.loggers import EvaluationTracker
    from lmms_eval.models import get_model
    from lmms_eval.tasks import TaskManager

    assert get_model(lmms_eval_manifest.MODEL).__name__ == "LlamaVisionTrimmed"
    data = tmp_path / "digits.jsonl"
    data.write_text(
        "".join(
            json.dumps({"picture": str(e.picture), "question": e.question, "answer": e.answer}) + "\n"
            for e in examples()
        )
    )
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "digits.yaml").write_text(TASK.format(data=data))
    (tmp_path / "task" / "digits.py").write_text(VISUAL)
    for ratio in ("stock", "1.0", "0.1"):
        tracker = EvaluationTracker(output_path=str(tmp_path / "results" / ratio))
        arguments = f"pretrained={SMALL_MODEL},device=cpu,dtype=float32,top_k_ratio={ratio}"
        results = simple_evaluate(
            lmms_eval_manifest.MODEL,
            arguments,
            tasks=["digits"],
            batch_size=2,
            task_manager=TaskManager(include_path=str(tmp_path / "task"), include_defaults=False),
            evaluation_tracker=tracker,
            bootstrap_iters=0,
            log_samples=True,
        )
        tracker.save_results_aggregated(results=results, samples=results.get("samples"), datetime_str="2025-01-01")
    capsys.readouterr()
    assert lmms_eval_table.main([str(tmp_path / "results"), "--out", str(tmp_path / "comparison")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| stock", "| exact", "| 0.1"]
    stock, exact = (line.split(" | ")[1].split()[0] for line in lines[2:4])
    assert stock == exact
