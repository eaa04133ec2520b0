"""The small Mllama: its configuration, its initial weights and its processor."""

from __future__ import annotations

import math

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn
from transformers import (
    GenerationConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from benchmarks.small_model.questions import NUMBERS
from benchmarks.small_model.scenes import COLOURS
from benchmarks.small_model.variants import COARSE, Variant

PAD, BOS, EOS, UNKNOWN, USER, ASSISTANT = "<|pad|>", "<|bos|>", "<|eos|>", "<|unknown|>", "<|user|>", "<|assistant|>"
IMAGE = "<|image|>"

_WORDS = """
a above all an and any are as at background below between big biggest bottom by can center colored coloured color colors
colour colours column corner count dark describe different digit digits do does even first from has have how i image in is
it large larger largest last least left leftmost list light lowest many maximum middle minimum most more name no none not
number numbers odd of on one's only or order picture please position product read right rightmost row s same say see show
shown small smaller smallest sum than that the there this to top total two's up what where which with write yes you
ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy
highest fewest
""".split()  # noqa: SIM905

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' }}{% else %}{{ '<|user|>' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|image|>' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, digits and punctuation; case is ignored, unknown words become ``<|unknown|>``.

    The image token is the last one: its id equals the text model's ``vocab_size``, as in Llama-3.2-Vision.
    """
    words = [*NUMBERS, *COLOURS, *(str(n) for n in range(10)), *".,?!:;'-()", *_WORDS]
    vocabulary = [PAD, BOS, EOS, UNKNOWN, USER, ASSISTANT, *dict.fromkeys(words)]
    vocabulary += [f"<|reserved_{n}|>" for n in range(-len(vocabulary) % 8)] + [IMAGE]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"[0-9]|[a-z]+|[^\sa-z0-9]"), "isolated"), pre_tokenizers.WhitespaceSplit()]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # joins with spaces, none before punctuation
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT, IMAGE],
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_processor(variant: Variant = COARSE) -> MllamaProcessor:
    """The real Mllama processor, for the variant's tiles, with the image processor that needs no torchvision."""
    image_processor = MllamaImageProcessorPil(size={"height": variant.tile, "width": variant.tile}, max_image_tiles=4)
    return MllamaProcessor(image_processor, build_tokenizer(), chat_template=CHAT_TEMPLATE)


def build_config(tokenizer: PreTrainedTokenizerFast, variant: Variant = COARSE) -> MllamaConfig:
    """1.8 million parameters (coarse): 4 tiles of 65 or 257 visual tokens, cross-attention in layers 1, 3 and 5 of 6."""
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    vision = MllamaVisionConfig(
        hidden_size=96,
        num_hidden_layers=3,
        num_global_layers=1,
        attention_heads=4,
        intermediate_size=384,
        image_size=variant.tile,
        patch_size=variant.patch,
        max_num_tiles=4,
        intermediate_layers_indices=[1, 2],
        vision_output_dim=96 * 3,
    )
    text = MllamaTextConfig(
        vocab_size=image_id,
        hidden_size=128,
        num_hidden_layers=6,
        cross_attention_layers=[1, 3, 5],
        num_attention_heads=8,
        num_key_value_heads=variant.key_value_heads,
        intermediate_size=256,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return MllamaConfig(vision_config=vision, text_config=text, image_token_index=image_id)


def build_model(config: MllamaConfig, seed: int) -> MllamaForConditionalGeneration:
    """A model with initial weights that learn; transformers' own (std 0.02, gates 0) don't in a thousand steps."""
    torch.manual_seed(seed)
    model = MllamaForConditionalGeneration(config)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    vision = model.model.vision_model
    nn.init.normal_(vision.patch_embedding.weight, std=1 / math.sqrt(75))
    nn.init.normal_(vision.class_embedding, std=0.5)
    nn.init.normal_(vision.gated_positional_embedding.embedding, std=0.5)
    nn.init.normal_(vision.gated_positional_embedding.tile_embedding.weight, std=0.1)
    for tile in (vision.pre_tile_positional_embedding, vision.post_tile_positional_embedding):
        nn.init.normal_(tile.embedding.weight, std=0.2)
        nn.init.constant_(tile.gate, 0.8)
    for layer in vision.global_transformer.layers:
        nn.init.constant_(layer.gate_attn, 0.8)
        nn.init.constant_(layer.gate_ffn, 0.8)
    language = model.model.language_model
    nn.init.normal_(language.embed_tokens.weight, std=0.5)
    for index in config.text_config.cross_attention_layers:
        nn.init.constant_(language.layers[index].cross_attn_attn_gate, 0.7)
        nn.init.constant_(language.layers[index].cross_attn_mlp_gate, 0.7)
    model.generation_config = GenerationConfig(
        bos_token_id=config.text_config.bos_token_id,
        eos_token_id=config.text_config.eos_token_id,
        pad_token_id=config.text_config.pad_token_id,
        max_new_tokens=32,
        do_sample=False,
    )
    return model


def prompt_ids(tokenizer: PreTrainedTokenizerFast, question: str) -> list[int]:
    """Token ids of the chat prompt for one image and one question, as the chat template writes it."""
    return tokenizer(f"{BOS}{USER}{IMAGE}{question}{ASSISTANT}", add_special_tokens=False).input_ids
