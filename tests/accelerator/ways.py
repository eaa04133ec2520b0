"""Ways of generating that are run on the CPU and on the emulated accelerator: each by its name, with what must come out equal."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from accelerate import dispatch_model
from transformers import AttentionInterface, AttentionMaskInterface, MllamaForConditionalGeneration
from transformers.masking_utils import sdpa_mask
from transformers.models.mllama.modeling_mllama import eager_attention_forward

from trim_plugin import Engine, KCenter, Pictures, TopPPerHead, TrimmedCache, encode_pictures, prefill, visualize
from trim_plugin.compat import CACHE, cache_of
from trim_plugin.embedded import examples, load_small_model

from ..exactness.conversations import Conversation
from ..random_models import PAIR, Sample, random_inputs, random_model
from .emulation import Emulated, to_devices

#: Attention functions: transformers' two, and one that a user has registered, which trim_plugin knows nothing of.
REGISTERED = "of_a_user"
ATTENTIONS = ("sdpa", "eager", REGISTERED)
AttentionInterface.register(REGISTERED, eager_attention_forward)
AttentionMaskInterface.register(REGISTERED, sdpa_mask)

#: Pictures of one to four tiles, one or two a sample, texts of unequal lengths.
MIXED = [Sample((1, (1,), 5)), Sample((2, (8,), 3)), Sample((1, (6,), 2, (3,), 4)), Sample((1, (2,), 6))]
ALONE = [Sample((1, (6,), 6))]
TEXT = [Sample((5,)), Sample((3,))]
#: From this layer on the random model is on the second device: its first cross-attention layer (1) is on the first, the other (3)
#: on the second.
SPLIT = 3


@dataclasses.dataclass
class Place:
    """Where a way runs: a model, and what brings its inputs there."""

    model: Any
    device: str = "cpu"
    #: Of the small trained model, for ways that need a processor.
    small: Callable[[], tuple[Any, Any]] = load_small_model

    def put(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def inputs(self, samples: list[Sample], right: bool = False) -> dict[str, torch.Tensor]:
        inputs = random_inputs(self.model, samples)
        return self.put(padded_right(inputs) if right else inputs)


def padded_right(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same prompts with their padding behind the text."""
    turned = {name: inputs[name].clone() for name in ("input_ids", "attention_mask", "cross_attention_mask")}
    for sample, real in enumerate(inputs["attention_mask"].sum(dim=1).tolist()):
        for tensor in turned.values():
            tensor[sample] = tensor[sample].roll(real - inputs["input_ids"].shape[1], dims=0)
    return {**inputs, **turned}


def results(output: Any) -> list[Any]:
    """What must be equal everywhere: tokens, and what is kept of which sizes."""
    cache = cache_of(output)
    found = [on_cpu(output.sequences).tolist()]
    if isinstance(cache, TrimmedCache):
        found += [on_cpu(one).tolist() for one in (*cache.kept_indices, *cache.kept_sizes)]
    return found


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.inner if isinstance(tensor, Emulated) else tensor


def generated(
    place: Place,
    config: dict[str, Any] | None = None,
    samples: list[Sample] = PAIR,
    right: bool = False,
    new: int = 4,
    **settings: Any,
) -> list[Any]:
    """`generate` with a trimmed cache of these settings."""
    output = place.model.generate(
        **place.inputs(samples, right),
        cache_implementation="trimmed",
        cache_config=config or {},
        max_new_tokens=new,
        return_dict_in_generate=True,
        **{"do_sample": False, **settings},
    )
    return results(output)


def conversation(place: Place, turns: list[list[Sample]], **config: Any) -> list[Any]:
    """Turns on one cache."""
    talk, cache = Conversation(place.model, len(turns[0])), TrimmedCache(place.model, config)
    found = []
    for turn in turns:
        earlier = talk.pixels.shape[1]
        talk.say(*turn)
        output = place.model.generate(
            **place.put(talk.inputs(earlier)),
            **{CACHE: cache},
            max_new_tokens=3,
            do_sample=False,
            return_dict_in_generate=True,
        )
        found += results(output)
        talk.hear(on_cpu(output.sequences))
    return found


def assisted(place: Place, **config: Any) -> list[Any]:
    """Candidates of a smaller model, which sees the pictures as well."""
    assistant = random_model(1, layers=3, cross_layers=(1,))
    if place.device != "cpu":
        to_devices(assistant, place.device)
    return generated(place, config, ALONE, assistant_model=assistant, new=6)


def looked_up(place: Place, **config: Any) -> list[Any]:
    """Candidates from the prompt, which says something twice."""
    inputs = random_inputs(place.model, ALONE)
    inputs["input_ids"][0, -2:] = inputs["input_ids"][0, 2:4]
    output = place.model.generate(
        **place.put(inputs),
        cache_implementation="trimmed",
        cache_config=config,
        max_new_tokens=6,
        do_sample=False,
        prompt_lookup_num_tokens=2,
        return_dict_in_generate=True,
    )
    return results(output)


def by_hand(place: Place, **config: Any) -> list[Any]:
    """`prefill`, then forwards in a loop, a batch that shrinks, and a report."""
    inputs, cache = place.inputs(MIXED), TrimmedCache(place.model, config)
    with torch.no_grad():
        logits, tokens = prefill(place.model, cache, **inputs).logits, []
        mask = inputs["attention_mask"]
        for step in range(3):
            if step == 1:
                chosen = torch.tensor([2, 0], device=place.device)
                cache.batch_select_indices(chosen)
                logits, mask = logits.index_select(0, chosen), mask.index_select(0, chosen)
            ids = logits[:, -1].argmax(dim=-1, keepdim=True)
            tokens.append(ids.tolist())
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            logits = place.model(input_ids=ids, attention_mask=mask, **{CACHE: cache}, use_cache=True).logits
    return [tokens, [one.tolist() for one in cache.kept_indices], dataclasses.asdict(cache.report())]


def encoded(place: Place, folder: Any, rule: Any = None, copies: int = 1, **config: Any) -> list[Any]:
    """Pictures that are encoded, saved, loaded where the model is, and asked about."""
    model, processor = place.small()
    paths = [example.picture for example in examples()[:2]]
    pictures = []
    for number, path in enumerate(paths):
        encode_pictures(model, processor, [path], rule=rule).save(folder / f"{number}")
        pictures.append(Pictures.load(folder / f"{number}", device=place.device))
    inputs = [one.inputs(processor, "Read all digits.") for one in pictures]
    both = {name: torch.cat([one[name].to("cpu") for one in inputs]) for name in inputs[0]}
    cache = TrimmedCache(model, config, pictures=pictures)
    output = model.generate(
        **place.put(both),
        **{CACHE: cache},
        max_new_tokens=4,
        do_sample=False,
        num_beams=copies,
        num_return_sequences=copies,
        return_dict_in_generate=True,
    )
    return results(output)


def engine(place: Place, **config: Any) -> list[Any]:
    """Several requests at once: texts alone, pictures, one of several, greedy and drawn."""
    model, processor = place.small()
    one, two = (example.picture for example in examples()[:2])
    asked = [
        ([one], {}),
        ([], {}),
        ([one, two], {}),
        ([two], {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.2}),
    ]
    with Engine(model, processor, config, memory=2**30) as running:
        requests = [
            running.submit("Read all digits.", images=images, max_new_tokens=5, **settings)
            for images, settings in asked
        ]
        return [(request.result(timeout=120).tokens, request.result().kept) for request in requests]


def shown(place: Place) -> list[Any]:
    """The picture of what is kept, by what it says and draws."""
    figure = visualize(place.model, place.inputs(PAIR), {"top_k_ratio": 0.2}, sample=0)
    return [[axes.get_title(), *(image.get_array().tolist() for image in axes.get_images())] for axes in figure.axes]


NEEDS_BITSANDBYTES = ("int8 KV", "nf4 KV", "nf4 KV, beams", "nf4 KV, conversation")
#: Name → what runs, given a place (and a folder, where it writes).
WAYS: dict[str, Callable[..., list[Any]]] = {
    "default": generated,
    "exact": functools.partial(generated, config={"top_k_ratio": 1.0}),
    "dropped": functools.partial(generated, config={"top_k_ratio": 0.2, "merge": False}),
    "k-center, a share": functools.partial(generated, config={"processors": [KCenter(0.3)]}),
    "k-center, a radius": functools.partial(generated, config={"processors": [KCenter(radius=0.3)]}),
    "top-p": functools.partial(generated, config={"processors": [TopPPerHead(0.6)]}),
    "top-p, then k-center": functools.partial(generated, config={"processors": [TopPPerHead(0.9), KCenter(0.5)]}),
    "int8 KV": functools.partial(generated, config={"kv_quantization": "int8"}, samples=MIXED),
    "nf4 KV": functools.partial(generated, config={"kv_quantization": "nf4"}),
    "nf4 KV, beams": functools.partial(generated, config={"kv_quantization": "nf4"}, num_beams=2),
    "nf4 KV, conversation": functools.partial(
        conversation, turns=[PAIR, [Sample((1, (2,), 2))] * 2], kv_quantization="nf4"
    ),
    "sampling": functools.partial(generated, do_sample=True, temperature=1.3, top_p=0.9),
    "beams": functools.partial(generated, num_beams=3),
    "beams, several returned": functools.partial(generated, samples=MIXED, num_beams=3, num_return_sequences=2),
    "beam sampling": functools.partial(generated, num_beams=2, do_sample=True),
    "several returned": functools.partial(generated, do_sample=True, num_return_sequences=3),
    "several returned, exact": functools.partial(
        generated, config={"top_k_ratio": 1.0}, samples=MIXED, do_sample=True, num_return_sequences=2
    ),
    "assisted": assisted,
    "prompt lookup": looked_up,
    "micro-batches": functools.partial(generated, config={"prefill_pictures": 1}, samples=MIXED),
    "micro-batches, exact": functools.partial(
        generated, config={"prefill_pictures": 1, "top_k_ratio": 1.0}, samples=MIXED
    ),
    "micro-batches, beams": functools.partial(generated, config={"prefill_pictures": 2}, samples=MIXED, num_beams=2),
    "conversation, a new picture": functools.partial(
        conversation, turns=[PAIR, [Sample((1, (2,), 2)), Sample((1, (6,), 2))]]
    ),
    "conversation, text": functools.partial(conversation, turns=[MIXED, [Sample((3,))] * 4, [Sample((2,))] * 4]),
    "conversation, exact": functools.partial(
        conversation, turns=[PAIR, [Sample((1, (2,), 2))] * 2, [Sample((2,))] * 2], top_k_ratio=1.0
    ),
    "conversation, micro-batches": functools.partial(
        conversation, turns=[PAIR, [Sample((1, (2,), 2))] * 2], prefill_pictures=1
    ),
    "static": functools.partial(generated, config={"static": True}, disable_compile=True),
    "static, returned": functools.partial(
        generated, config={"static": True}, disable_compile=True, do_sample=True, num_return_sequences=2
    ),
    "text only": functools.partial(generated, samples=TEXT),
    "mixed tiles": functools.partial(generated, samples=MIXED),
    "mixed tiles, exact": functools.partial(generated, config={"top_k_ratio": 1.0}, samples=MIXED),
    "padded right": functools.partial(generated, samples=MIXED, right=True),
    "tower on fewer patches": functools.partial(generated, config={"tower_share": 0.6}, samples=MIXED),
    "by hand": functools.partial(by_hand, top_k_ratio=0.3),
    "encoded": encoded,
    "encoded, k-center": functools.partial(encoded, rule=KCenter(0.25)),
    "encoded, beams": functools.partial(encoded, rule=KCenter(0.25), copies=2),
    "engine": functools.partial(engine, top_k_ratio=0.3),
    "engine, exact": functools.partial(engine, top_k_ratio=1.0),
    "shown": shown,
}
WRITES = ("encoded", "encoded, k-center", "encoded, beams")
OF_SMALL = (*WRITES, "engine", "engine, exact")


def emulated_place(devices: int, attention: str, **settings: Any) -> Place:
    """A random model (of these settings) on one device, or its layers on two. To be called within an emulation."""
    model = on_devices(random_model(attention=attention, **settings), devices, SPLIT)
    return Place(model, "cuda:0", functools.partial(_small, devices, attention))


def cpu_place(attention: str) -> Place:
    return Place(random_model(attention=attention), small=functools.partial(_small, 0, attention))


@functools.lru_cache(maxsize=8)
def _small(devices: int, attention: str) -> tuple[Any, Any]:
    model, processor = load_small_model()
    model.set_attn_implementation(attention)
    if devices:
        model = on_devices(model, devices, 3)
    return model, processor


def on_devices(model: MllamaForConditionalGeneration, devices: int, split: int) -> Any:
    """The model on emulated devices: all on one, or its text layers from `split` on and the head on another."""
    if devices == 1:
        return to_devices(model, "cuda:0")
    inner = model.model
    device_map: dict[str, int] = {"model.vision_model": 0, "model.multi_modal_projector": 0, "lm_head": 1}
    for name, _ in inner.language_model.named_children():
        if name != "layers":
            device_map[f"model.language_model.{name}"] = int(name == "norm")
    for number in range(len(inner.language_model.layers)):
        device_map[f"model.language_model.layers.{number}"] = int(number >= split)
    return dispatch_model(model, device_map, main_device=0)
