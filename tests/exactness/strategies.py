"""Hypothesis strategies: random models and prompts with pictures."""

from __future__ import annotations

from hypothesis import strategies as st

from ..random_models import Sample

texts = st.integers(1, 6)
pictures = st.lists(st.integers(1, 8), min_size=1, max_size=2).map(tuple)
#: text, pictures, text, ... and always text at the end, as a chat template does
prompts_with_pictures = st.lists(st.tuples(pictures, texts), min_size=1, max_size=3).flatmap(
    lambda turns: st.integers(0, 3).map(
        lambda before: Sample(((before,) if before else ()) + tuple(part for turn in turns for part in turn))
    )
)
prompts_without_pictures = st.integers(1, 9).map(lambda length: Sample((length,)))
batches_with_pictures = st.lists(prompts_with_pictures, min_size=1, max_size=3)
batches_with_equally_many_pictures = st.integers(1, 2).flatmap(
    lambda count: st.lists(
        st.tuples(texts, st.lists(st.integers(1, 8), min_size=count, max_size=count).map(tuple), texts).map(Sample),
        min_size=1,
        max_size=3,
    )
)
mixed_batches = st.lists(st.one_of(prompts_with_pictures, prompts_without_pictures), min_size=1, max_size=3)

model_settings = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**16),
        "attention": st.sampled_from(["sdpa", "eager"]),
        "image_size": st.sampled_from([8, 16]),
    }
).flatmap(
    lambda settings: st.sampled_from([(4, 4), (4, 2), (4, 1), (2, 1), (8, 2)]).flatmap(
        lambda heads: st.sampled_from([(5, (1, 3)), (4, (1,)), (6, (1, 2, 5)), (5, (3, 1))]).map(
            lambda layers: (
                settings | {"heads": heads[0], "kv_heads": heads[1], "layers": layers[0], "cross_layers": layers[1]}
            )
        )
    )
)
