"""Questions about held-out scenes, two turns each, and greedy answers to them."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import torch

from benchmarks.common.decoding import Decoding
from benchmarks.common.seeds import SEED
from benchmarks.small_model.architecture import ASSISTANT, EOS, USER, build_tokenizer, prompt_ids
from benchmarks.small_model.batches import image_inputs
from benchmarks.small_model.tasks import DIGITS, Task
from trim_plugin.forward.tower_merging import merging_in_tower

LONGEST_ANSWER = 44


@dataclasses.dataclass
class Batch:
    """Questions of one type about several scenes, and follow-ups of another; the vision tower has run once for all rules.

    Args:
        inputs: of the first turn, as a forward takes them, with `cross_attention_states`.
        kind: type of the first question.
        answers: the true answers' tokens.
        follow_ups: tokens of the second turn's text, from the user's mark to the assistant's.
        follow_up_answers: the true answers' tokens.
        scenes: number of every sample's scene.
    """

    inputs: dict[str, torch.Tensor]
    kind: str
    answers: list[list[int]]
    follow_ups: list[list[int]]
    follow_up_answers: list[list[int]]
    scenes: list[int]


def scenes_from(first: int, count: int, model: Any, task: Task = DIGITS) -> list[Any]:
    """Scenes of a kind that training never saw, at the resolution that the model sees."""
    return [task.draw(first + number, model.config.vision_config.image_size, True) for number in range(count)]


@torch.no_grad()
def question_batches(model: Any, scenes: list[Any], seed: int, size: int = 100, task: Task = DIGITS) -> list[Batch]:
    """Every trained question type about every scene, and after it a question of the next type."""
    tokenizer, rng, batches = build_tokenizer(), np.random.default_rng([SEED, seed]), []
    # Scenes that show as many things go together: their answers are about as long.
    order = sorted(range(len(scenes)), key=lambda number: task.things(scenes[number]))

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    for start in range(0, len(scenes), size):
        numbers = order[start : start + size]
        part = [scenes[number] for number in numbers]
        pixels = image_inputs([scene.image for scene in part], model.config.vision_config.image_size)
        states = visual_states(model, pixels)
        for turn, kind in enumerate(task.types):
            pairs = [task.ask(scene, kind, rng) for scene in part]
            second = [task.ask(scene, task.types[(turn + 1) % len(task.types)], rng) for scene in part]
            batches.append(
                Batch(
                    inputs=_prompts([prompt_ids(tokenizer, question) for question, _ in pairs], tokenizer, pixels)
                    | {"cross_attention_states": states},
                    kind=kind,
                    answers=[ids(answer) for _, answer in pairs],
                    follow_ups=[ids(f"{EOS}{USER}{question}{ASSISTANT}") for question, _ in second],
                    follow_up_answers=[ids(answer) for _, answer in second],
                    scenes=numbers,
                )
            )
    return batches


@torch.no_grad()
def visual_states(model: Any, pixels: dict[str, torch.Tensor], tower_share: float | None = None) -> torch.Tensor:
    """What the text model reads of pictures, (tiles of all, patches, width)."""
    own = pixels | {"pixel_values": pixels["pixel_values"].to(model.dtype)}
    with merging_in_tower(model.model.vision_model, tower_share, pixels["aspect_ratio_mask"]):
        features = model.model.vision_model(**own).last_hidden_state
    # Tiles in a row: bitsandbytes' int8 layers take no five dimensions.
    return model.model.multi_modal_projector(features.flatten(0, 2))


def _prompts(prompts: list[list[int]], tokenizer: Any, pixels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ids, mask = _left_padded(prompts, tokenizer.pad_token_id)
    reads = (ids == tokenizer.convert_tokens_to_ids("<|image|>")).long().cumsum(dim=1) * mask
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
        "cross_attention_mask": reads[:, :, None, None] * pixels["aspect_ratio_mask"][:, None],
    }


def _left_padded(rows: list[list[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([[padding] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def answer_both(
    model: Any, batch: Batch, cache: Any, first_answers: list[list[int]] | None
) -> tuple[list[list[int]], list[list[int]]]:
    """Greedy answers to both questions, token ids without the end token.

    Args:
        model: an Mllama model.
        batch: the questions.
        cache: a new cache; holds the first turn's prompt and answer afterwards.
        first_answers: what the second turn takes for the first one's answers, so that it can be compared between caches whose
            own answers differ; None for the model's own.
    """
    decoding = Decoding(model, batch.inputs, cache)
    first = decoding.prefill()
    kept = copy.deepcopy(cache)
    answers = _answers(decoding, first)
    told = [
        told + question
        for told, question in zip(answers if first_answers is None else first_answers, batch.follow_ups, strict=True)
    ]
    ids, mask = _left_padded(told, int(model.config.text_config.pad_token_id or 0))
    seen = torch.cat([batch.inputs["attention_mask"], mask], dim=1)
    second = {
        "input_ids": ids,
        "attention_mask": seen,
        "position_ids": (seen.cumsum(dim=1) - 1)[:, -ids.shape[1] :],
        "cross_attention_mask": batch.inputs["cross_attention_mask"][:, -1:].expand(-1, ids.shape[1], -1, -1),
    }
    decoding = Decoding(model, second, kept)
    return answers, _answers(decoding, decoding.prefill())


def _answers(decoding: Decoding, first: torch.Tensor) -> list[list[int]]:
    end = build_tokenizer().eos_token_id
    tokens, finished = [first], first == end
    while len(tokens) < LONGEST_ANSWER and not bool(finished.all()):
        tokens.append(decoding.step())
        finished |= tokens[-1] == end
    rows = torch.cat(tokens, dim=1).tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]
