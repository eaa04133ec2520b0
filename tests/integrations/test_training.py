"""The collator: what the loss is on, what the answers read, and that training with it teaches an answer."""

import pytest
import torch
from peft import get_peft_model

from trim_plugin.embedded import examples, load_small_model
from trim_plugin.integrations.peft import lora_config
from trim_plugin.integrations.training import IGNORED, AnswerCollator
from trim_plugin.pictures.prompting import build_inputs, open_picture

PICTURES = [open_picture(example.picture) for example in examples()[:3]]
EXAMPLES = [
    {"pictures": PICTURES[:1], "question": "Which digit is red?", "answer": "seven"},
    {"pictures": PICTURES[1:3], "question": "How many digits are there in the first picture?", "answer": "red two, blue three"},
    {"pictures": PICTURES[2:], "question": "Read all digits.", "answer": "none"},
]  # fmt: skip


@pytest.fixture(scope="module")
def batch(small):
    return AnswerCollator(small[1])(EXAMPLES)


def test_labels_are_the_answers_and_their_end_alone(small, batch):
    tokenizer = small[1].tokenizer
    for labels, ids, example in zip(batch["labels"], batch["input_ids"], EXAMPLES, strict=True):
        labelled = labels != IGNORED
        assert torch.equal(labels[labelled], ids[labelled])
        assert tokenizer.decode(labels[labelled][:-1]) == example["answer"]
        assert labels[labelled][-1] == tokenizer.eos_token_id
    lengths = {value.shape[1] for key, value in batch.items() if key in ("input_ids", "attention_mask", "labels")}
    assert lengths == {batch["cross_attention_mask"].shape[1]}


def test_padding_is_masked_and_never_labelled(small, batch):
    pad = small[1].tokenizer.pad_token_id
    assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == pad)
    assert not ((batch["labels"] != IGNORED) & (batch["attention_mask"] == 0)).any()


def test_answers_read_the_pictures_that_their_question_reads(batch):
    mask, labelled = batch["cross_attention_mask"], batch["labels"] != IGNORED
    first = int(labelled.nonzero()[:, 1].min())
    for sample, example in enumerate(EXAMPLES):
        rows = mask[sample, labelled[sample]]
        assert torch.equal(rows, mask[sample, first - 1].expand_as(rows))
        assert rows.any(dim=2).any(dim=0).tolist() == [True] * len(example["pictures"]) + [False] * (
            2 - len(example["pictures"])
        )


@pytest.mark.parametrize("chosen", [(0, 2), (1,)], ids=["one picture each", "two pictures"])
def test_the_loss_of_a_batch_is_that_of_its_samples_one_by_one(small, chosen):
    """Alone, a sample is the processor's own work on the prompt with its answer: no padding, no appended rows.

    Batches are of one number of pictures, since text before a picture reads padding pictures too in transformers.
    """
    model, processor = small
    losses, tokens = [], []
    together = [EXAMPLES[number] for number in chosen]
    for example in together:
        content = [{"type": "image"}] * len(example["pictures"]) + [{"type": "text", "text": example["question"]}]
        messages = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        text = prompt + example["answer"] + processor.tokenizer.eos_token
        inputs = processor(images=[example["pictures"]], text=text, add_special_tokens=False, return_tensors="pt")
        labels = inputs["input_ids"].clone()
        labels[:, : len(processor.tokenizer(prompt, add_special_tokens=False).input_ids)] = IGNORED
        with torch.no_grad():
            losses.append(float(model(**inputs, labels=labels).loss))
        tokens.append(int((labels != IGNORED).sum()))
    with torch.no_grad():
        loss = float(model(**AnswerCollator(processor)(together)).loss)
    alone = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)
    assert loss == pytest.approx(alone, abs=1e-4)


def test_a_processor_without_a_chat_format_puts_pictures_first(small):
    processor = load_small_model()[1]
    processor.chat_template = None
    batch = AnswerCollator(processor)(EXAMPLES[:1])
    alone = build_inputs(processor, EXAMPLES[0]["question"], PICTURES[:1])
    assert torch.equal(batch["input_ids"][:, : alone["input_ids"].shape[1]], alone["input_ids"])


def test_training_with_it_teaches_the_answer():
    """Adapters learn, from a few steps, an answer that the model does not give by itself; generation then gives it."""
    model, processor = load_small_model()
    question, answer = "What is the largest digit?", "blue, red"
    inputs = build_inputs(processor, question, PICTURES[:1])

    def said():
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    assert said() != answer
    torch.manual_seed(0)
    model = get_peft_model(model, lora_config("text_linear", rank=4)).train()
    batch = AnswerCollator(processor)([{"pictures": PICTURES[:1], "question": question, "answer": answer}])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval()
    assert said() == answer
