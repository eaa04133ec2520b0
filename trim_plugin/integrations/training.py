"""Training with pictures: from pictures, questions and answers to a batch with labels.

The loss is on the answers alone, and every row of an answer reads the pictures that the end of its question reads. Works as the
`data_collator` of transformers' `Trainer` (with `remove_unused_columns=False`) and in a loop of your own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from trim_plugin.pictures.prompting import tensors_of, written

IGNORED = -100
"""Label of what the loss leaves out; transformers' own."""


class AnswerCollator:
    """Makes a batch of questions about pictures, with labels on the answers.

    Prompts are padded on the left, answers on the right, so that all answers begin in the same column.

    Args:
        processor: an `MllamaProcessor`; questions are put in its chat format if it has one.

    Example:
        >>> from trim_plugin.embedded import examples, load_small_model
        >>> from trim_plugin.pictures.prompting import open_picture
        >>> _, processor = load_small_model()
        >>> picture = open_picture(examples()[0].picture)
        >>> batch = AnswerCollator(processor)(
        ...     [{"pictures": [picture], "question": "Which digit is red?", "answer": "seven"}]
        ... )
        >>> processor.tokenizer.decode(batch["labels"][batch["labels"] != IGNORED])
        'seven <|eos|>'
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch for `model(**batch).loss`.

        Args:
            examples: mappings with "pictures" (a list of at least one, read by the whole question), "question" and "answer",
                which are plain text.

        Returns:
            What the processor makes of pictures and questions, with the answers and their end appended to `input_ids`,
            `attention_mask` and `cross_attention_mask` (batch, length, pictures, tiles), and `labels` (batch, length): the
            answers' tokens, -100 elsewhere.

        Raises:
            ValueError: no examples, one that lacks a key or has no picture, or an answer that is empty.
        """
        _check(examples)
        pictures = [example["pictures"] for example in examples]
        prompts = [
            written(self.processor, example["question"], len(own))
            for example, own in zip(examples, pictures, strict=True)
        ]
        # Padded on the left, so that every prompt's last row is the batch's last.
        batch = tensors_of(self.processor, prompts, pictures)
        answers, present = self._answers([example["answer"] for example in examples], batch["input_ids"].dtype)
        labels = torch.full_like(batch["input_ids"], IGNORED)
        batch["labels"] = torch.cat([labels, answers.masked_fill(present == 0, IGNORED)], dim=1)
        batch["input_ids"] = torch.cat([batch["input_ids"], answers], dim=1)
        batch["attention_mask"] = torch.cat([batch["attention_mask"], present.to(batch["attention_mask"].dtype)], dim=1)
        mask = batch["cross_attention_mask"]
        batch["cross_attention_mask"] = torch.cat([mask, mask[:, -1:].expand(-1, answers.shape[1], -1, -1)], dim=1)
        return batch

    def _answers(self, answers: list[str], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids of the answers with their end, padded on the right, and where they are: (batch, longest) each."""
        tokenizer = self.processor.tokenizer
        # Tokenized apart from the prompt, as in generation, where the answer's first token cannot merge with the prompt's last.
        rows = [[*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for answer in answers]
        fill = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        ids = pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], batch_first=True, padding_value=fill)
        return ids, pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)


def _check(examples: Sequence[Mapping[str, Any]]) -> None:
    if not examples:
        raise ValueError("There are no examples to make a batch of.")
    for number, example in enumerate(examples):
        missing = {"pictures", "question", "answer"} - example.keys()
        if missing:
            raise ValueError(
                f"Example {number} has no {', '.join(map(repr, sorted(missing)))}. Trainer drops unknown columns unless "
                "remove_unused_columns=False."
            )
        if not example["pictures"]:
            raise ValueError(f"Example {number} has no picture: give at least one in 'pictures'.")
        if not example["answer"].strip():
            raise ValueError(f"Example {number} has an empty answer: there is nothing to learn from it.")
