"""Show that training computes what the processor and the model compute: ``python -m benchmarks.small_model.check``."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.small_model.architecture import build_config, build_model, build_processor
from benchmarks.small_model.batches import image_inputs, pack
from benchmarks.small_model.losses import packed_logits, projected, visual_features
from benchmarks.small_model.tasks import DIGITS, PAGES, Task
from benchmarks.small_model.variants import COARSE, FINE, Variant


def largest_differences(count: int = 24, variant: Variant = COARSE, task: Task = DIGITS) -> tuple[float, float]:
    """Largest difference of the pixels (fast preprocessing against the processor), and of the answers' logits (packed
    questions against one question at a time), over ``count`` training scenes of all sizes and layouts."""
    processor = build_processor(variant)
    model = build_model(build_config(processor.tokenizer, variant), seed=0).eval()
    scenes = [task.draw(seed, variant.tile, False) for seed in range(count)]
    fast = image_inputs([scene.image for scene in scenes], variant.tile)
    real = processor.image_processor([[scene.image] for scene in scenes], return_tensors="pt")
    pixels = max((fast[key] - real[key]).abs().max().item() for key in fast)

    rng = np.random.default_rng(0)
    rows = [[task.ask(scene, kind, rng, vary=True) for kind in task.types] for scene in scenes]
    texts = pack(processor.tokenizer, rows)
    logits = 0.0
    with torch.no_grad():
        states = projected(model, visual_features(model, {key: torch.as_tensor(value) for key, value in real.items()}))
        packed = packed_logits(model, states, texts, real["aspect_ratio_mask"])
        for number, (scene, pairs) in enumerate(zip(scenes, rows, strict=True)):
            for segment, (question, answer) in enumerate(pairs, start=1):
                message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
                prompt = processor.apply_chat_template([message], add_generation_prompt=True)
                inputs = processor(
                    images=scene.image, text=f"{prompt}{answer}", add_special_tokens=False, return_tensors="pt"
                )
                alone = model(**inputs).logits[0]
                together = packed[number][texts["segments"][number] == segment]
                if alone.shape != together.shape:
                    raise RuntimeError(f"{question!r} is {together.shape[0]} tokens packed, {alone.shape[0]} alone")
                logits = max(logits, (alone - together).abs().max().item())
    return pixels, logits


def main() -> None:
    """Print the differences; fail if they are more than rounding."""
    for variant, task in ((COARSE, DIGITS), (FINE, DIGITS), (FINE, PAGES)):
        pixels, logits = largest_differences(variant=variant, task=task)
        print(f"{variant.name}, {task.name}: largest difference: pixels {pixels:.2e}, logits {logits:.2e}")
        if pixels > 1e-5 or logits > 1e-3:
            raise SystemExit("training does not compute what the model computes")


if __name__ == "__main__":
    main()
