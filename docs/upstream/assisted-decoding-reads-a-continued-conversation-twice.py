# Assisted decoding reads a continued conversation twice
#
# With a cache that holds a part of `input_ids`, the first forward is not cut to the new tokens: the
# cache grows by the whole conversation, without an error. trim_plugin raises `NotImplementedError`.

import torch
from transformers import (
    DynamicCache,
    MllamaConfig,
    MllamaForCausalLM,
    MllamaForConditionalGeneration,
)

vision = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_global_layers=1,
    attention_heads=2,
    intermediate_size=32,
    vision_output_dim=32,
    image_size=8,
    patch_size=4,
    max_num_tiles=4,
    intermediate_layers_indices=[1],
)
text = dict(
    vocab_size=32,
    hidden_size=32,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    cross_attention_layers=[1, 3],
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)


def make(**changes):
    torch.manual_seed(0)
    model = MllamaForConditionalGeneration(
        MllamaConfig(
            vision_config=vision,
            text_config={**text, **changes},
            image_token_index=32,
        )
    ).eval()
    for name, parameter in model.named_parameters():
        if "gate" in name:
            parameter.data.fill_(0.8)
        elif parameter.ndim >= 2:
            parameter.data.normal_(
                0.0, 1.0 if "embed" in name else 1.5 / parameter.shape[-1] ** 0.5
            )
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


model = make()
inputs = dict(
    input_ids=torch.tensor([[5, 32, 7, 8, 9, 7, 8, 5]]),
    attention_mask=torch.ones(1, 8, dtype=torch.long),
    pixel_values=torch.randn(1, 1, 4, 3, 8, 8),
    aspect_ratio_ids=torch.tensor([[6]]),
    aspect_ratio_mask=torch.ones(1, 1, 4, dtype=torch.long),
    cross_attention_mask=torch.cat(
        [torch.zeros(1, 1, 1, 4), torch.ones(1, 7, 1, 4)], dim=1
    ).long(),
)
greedy = dict(max_new_tokens=12, do_sample=False)


def error(call):
    try:
        call()
    except Exception as raised:
        return type(raised).__name__

words = dict(
    input_ids=inputs["input_ids"][:, 2:],
    attention_mask=inputs["attention_mask"][:, 2:],
)
cache = DynamicCache(config=model.config.text_config)
first = model.generate(**words, **greedy, cache=cache)
more = torch.cat([first, torch.tensor([[7, 8, 9]])], dim=1)
length = cache.get_seq_length()
try:
    model.generate(
        more,
        attention_mask=torch.ones_like(more),
        max_new_tokens=2,
        do_sample=False,
        cache=cache,
        prompt_lookup_num_tokens=2,
    )
except (IndexError, RuntimeError):
    pass
assert cache.get_seq_length() >= length + more.shape[1]
