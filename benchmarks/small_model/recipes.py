"""How each variant is trained: its stages, their steps and learning rates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from benchmarks.small_model.variants import COARSE, FINE, Variant


@dataclass(frozen=True)
class Stage:
    """Training with one loss and one learning-rate schedule. All lengths are steps, so that a run can be repeated."""

    name: str
    steps: int
    """Most steps."""
    rate: float
    """Peak learning rate: reached after ``warmup`` steps, kept, then a cosine to a hundredth over the last ``decay`` steps."""
    decay: int
    warmup: int = 150
    texts: bool = False
    """Train the whole model on questions; without it the vision tower alone, on what is under every patch."""
    frozen: bool = False
    """Train on questions all but the vision tower, which costs a third of a step."""
    repeats: int = 1
    """Updates for every reading of a batch by a frozen tower, with questions of their own."""
    together_every: int = 1
    """Tiles read each other in every so manieth step, and only themselves in the others (see ``apart.py``); 0: in none."""
    tokens: int = 0
    """The vision tower reads so many visual tokens of a picture, all that show print among them; 0: all (``thinned.py``)."""
    bfloat16: bool = False
    """Run the vision tower under bfloat16 autocast."""
    crowded: bool = False
    """Every second scene of the questions fills all four tiles and shows 5 to 8 digits: more to learn from a step."""
    patch_weight: float = 0.3
    """Weight of the patch loss beside the answers' loss."""
    window: int = 0
    """Steps over which the share of right answers is averaged to see a plateau; 0: the stage runs for all its steps."""
    gain: float = 0.01
    """The least gain from one window to the next. Less is a plateau: the decay begins."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.frozen and not self.texts:
            raise ValueError(f"stage {self.name!r} trains nothing: frozen=True needs texts=True")
        if self.tokens and self.together_every != 1:
            raise ValueError(f"stage {self.name!r} reads tiles apart or few tokens, not both: tokens={self.tokens}")
        if self.repeats > 1 and not self.frozen:
            raise ValueError(
                f"stage {self.name!r} can't repeat what it trains: repeats={self.repeats} needs frozen=True"
            )

    def apart(self, step: int) -> bool:
        """Whether tiles read only themselves in this step."""
        return not self.together_every or step % self.together_every != 0

    def factor(self, step: int, decay_from: int) -> float:
        """The learning rate at a step as a share of the peak, if the decay begins at step ``decay_from``."""
        down = min(1.0, max(0.0, (step - decay_from) / self.decay))
        return min(1.0, (step + 1) / self.warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * down)))


@dataclass(frozen=True)
class Recipe:
    """Everything that a training run depends on, its seed included."""

    variant: Variant
    stages: tuple[Stage, ...]
    batch: int
    """Scenes a step."""
    seed: int = 0
    warm: str = ""
    """Begin with the weights of the model of this name, "shipped" or "fine": see ``warm.py``."""
    optimizer: str = "adamw"
    """See ``optimizer.py``."""
    scenes: str = "digits"
    """What the scenes show: "digits" or "pages"."""

    def first_batch(self, index: int) -> int:
        """Number of the first batch of a stage: no other stage of its kind has had it."""
        stage = self.stages[index]
        return sum(earlier.steps for earlier in self.stages[:index] if earlier.texts == stage.texts)

    def with_steps(self, steps: dict[str, int]) -> Recipe:
        """The same with other most steps of some stages, by name; a decay longer than its stage is cut."""
        unknown = set(steps) - {stage.name for stage in self.stages}
        if unknown:
            raise ValueError(f"no such stages: {sorted(unknown)}; there are {[stage.name for stage in self.stages]}")
        changed = (replace(stage, steps=steps.get(stage.name, stage.steps)) for stage in self.stages)
        return replace(self, stages=tuple(replace(stage, decay=min(stage.decay, stage.steps)) for stage in changed))


RECIPES = {
    "coarse": Recipe(
        COARSE,
        (
            Stage("tower", 1274, 1.5e-3, decay=382),
            Stage("questions", 1928, 1e-3, decay=771, texts=True),
        ),
        batch=24,
    ),
    "fine": Recipe(
        FINE,
        (
            Stage("tower", 600, 1.5e-3, decay=50, warmup=50, together_every=0, bfloat16=True),
            Stage("mixed", 214, 1e-3, decay=1, warmup=50, texts=True, together_every=4),
            Stage("questions", 130, 1e-3, decay=1, warmup=50, texts=True),
            Stage("crowded", 230, 1e-3, decay=1, warmup=50, texts=True, bfloat16=True, crowded=True, patch_weight=1.0),
            Stage("last", 330, 1e-3, decay=310, warmup=20, texts=True, bfloat16=True, crowded=True, patch_weight=0.5),
            Stage("again", 340, 7e-4, decay=320, warmup=20, texts=True, bfloat16=True, crowded=True, patch_weight=0.5),
        ),
        batch=8,
        warm="shipped",
    ),
    "pages": Recipe(
        FINE,
        (
            Stage("tower", 600, 1.5e-3, decay=100, warmup=30, tokens=384),
            Stage(
                "reading", 200, 1e-3, decay=1, warmup=20, tokens=384, texts=True, crowded=True, frozen=True, repeats=3
            ),
            Stage(
                "questions", 2500, 1e-3, decay=1500, warmup=50, tokens=384, texts=True, crowded=True, patch_weight=0.5
            ),
            Stage("last", 400, 4e-4, decay=380, warmup=20, texts=True, crowded=True, patch_weight=0.5),
        ),
        batch=8,
        warm="fine",
        optimizer="muon",
        scenes="pages",
    ),
}
