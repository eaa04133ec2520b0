"""Layers in wrappers, removed and in another order: what stock transformers answers, a trimmed cache answers."""

import copy
import pickle

import pytest
import torch
import torch.distributed
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import trim_plugin
from trim_plugin import KCenter, TrimmedCache, encode_pictures
from trim_plugin.compat import cache_of
from trim_plugin.embedded import examples, load_small_model
from trim_plugin.forward.finding import Hook, Owner, cross_layers, decoder_layers, parts_of
from trim_plugin.generation.checks import has_hooks

from ..random_models import PAIR, Sample, generate, largest_difference, random_inputs, random_model, trimmed
from ..reference_rule import check_kept


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A process group of one."""
    file = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def layers_of(model):
    return model.model.language_model.layers


def six_layers():
    return random_model(layers=6, cross_layers=(1, 3))


def every(wrap):
    def change(model):
        layers = layers_of(model)
        for index in range(len(layers)):
            layers[index] = wrap(layers[index])

    return change


def one(index, wrap):
    def change(model):
        layers_of(model)[index] = wrap(layers_of(model)[index])

    return change


def every_attention(wrap):
    def change(model):
        for layer in cross_layers(model.model.language_model):
            layer.cross_attn = wrap(layer.cross_attn)

    return change


def reentrant(layer):
    return checkpoint_wrapper(layer, CheckpointImpl.REENTRANT)


def fsdp(layer, **settings):
    return FullyShardedDataParallel(layer, device_id=torch.device("cpu"), **settings)


def sharded_layers(model):
    mesh = init_device_mesh("cpu", (1,))
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    return mesh


def sharded(model):
    fully_shard(model, mesh=sharded_layers(model))


WRAPPED = {
    "checkpoint, every layer": every(checkpoint_wrapper),
    "checkpoint, reentrant": every(reentrant),
    "checkpoint, first cross layer": one(1, checkpoint_wrapper),
    "checkpoint, last cross layer": one(3, checkpoint_wrapper),
    "checkpoint twice": every(lambda layer: checkpoint_wrapper(checkpoint_wrapper(layer))),
    "checkpoint, attention": every_attention(checkpoint_wrapper),
    "FSDP1, every layer": every(fsdp),
    "FSDP1, own parameters": every(lambda layer: fsdp(layer, use_orig_params=True)),
    "FSDP1, one cross layer": one(3, fsdp),
    "FSDP1 around checkpoint": every(lambda layer: fsdp(checkpoint_wrapper(layer))),
    "FSDP2, layers": sharded_layers,
    "FSDP2, layers and model": sharded,
}


def check_answers(model, plain, new=6):
    """A changed model answers as one without the change: exact as stock, else as the same kept tokens answer there."""
    inputs = random_inputs(plain, PAIR)
    stock = generate(plain, inputs, new)
    exact = trimmed(model, inputs, {"top_k_ratio": 1.0}, new)
    assert torch.equal(exact.sequences, stock.sequences)
    assert largest_difference(exact, stock) <= 1e-5
    for config, settings in (
        ({"top_k_ratio": 0.15}, {}),
        ({}, {}),
        ({"top_k_ratio": 0.2, "merge": False}, {"num_beams": 2}),
    ):
        ours, same = (trimmed(one, inputs, config, new, **settings) for one in (model, plain))
        assert torch.equal(ours.sequences, same.sequences)
        assert largest_difference(ours, same) <= 1e-5
        if config.get("top_k_ratio") == 0.15:
            check_kept(cache_of(ours).kept_indices, plain, inputs, 0.15)


@pytest.mark.parametrize("attached", [False, True], ids=["wrapped first", "hooks first"])
@pytest.mark.parametrize("name", WRAPPED)
def test_layers_in_wrappers_answer_as_without(alone, name, attached):
    model = six_layers()
    if attached:
        TrimmedCache(model)
    WRAPPED[name](model)
    check_answers(model, six_layers())


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint, every layer",
        "checkpoint, attention",
        "FSDP1, every layer",
        "FSDP2, layers",
        "FSDP2, layers and model",
    ],
)
def test_encoded_pictures_are_read_by_wrapped_layers(alone, name):
    example, answers = examples()[0], []
    for wrapped in (False, True):
        model, processor = load_small_model(torch.float32)
        if wrapped:
            WRAPPED[name](model)
        pictures = encode_pictures(model, processor, [example.picture], rule=KCenter(0.2))
        cache = TrimmedCache(model, {}, pictures=pictures)
        answers.append(generate(model, pictures.inputs(processor, example.question), 4, cache=cache))
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    assert largest_difference(*answers) <= 1e-4


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, fsdp], ids=["checkpoint", "FSDP1"])
def test_layers_of_the_tower_may_be_wrapped(alone, wrap):
    inputs, outputs = random_inputs(six_layers(), PAIR), []
    for wrapped in (False, True):
        model = six_layers()
        if wrapped:
            encoder = model.model.vision_model.transformer
            for index in range(len(encoder.layers)):
                encoder.layers[index] = wrap(encoder.layers[index])
            model.model.vision_model.global_transformer = wrap(model.model.vision_model.global_transformer)
        outputs.append([trimmed(model, inputs, config) for config in ({}, {"tower_share": 0.5})])
    for plain, ours in zip(*outputs, strict=True):
        assert torch.equal(ours.sequences, plain.sequences)
        assert largest_difference(ours, plain) <= 1e-5


@pytest.mark.parametrize("wrapped_first", [False, True])
def test_pictures_fit_a_model_whether_its_tower_is_wrapped_or_not(wrapped_first):
    models = [load_small_model(torch.float32)[0] for _ in range(2)]
    processor = load_small_model()[1]
    layers = models[1].model.vision_model.transformer.layers
    for index in range(len(layers)):
        layers[index] = checkpoint_wrapper(layers[index])
    first, second = models[::-1] if wrapped_first else models
    pictures = encode_pictures(first, processor, [examples()[0].picture])
    inputs = pictures.inputs(processor, examples()[0].question)
    answers = [generate(one, inputs, 3, cache=TrimmedCache(one, {}, pictures=pictures)) for one in (first, second)]
    assert torch.equal(answers[0].sequences, answers[1].sequences)


def compiled(layer):
    return torch.compile(layer, backend="eager")


COMPILED = {
    "first cross layer": one(1, compiled),
    "last cross layer": one(3, compiled),
    "attention": every_attention(compiled),
    "every layer": every(compiled),
    "every layer, in place": lambda model: [layer.compile(backend="eager") for layer in layers_of(model)],
}


@pytest.mark.parametrize(
    "name", ["first cross layer", *(pytest.param(name, marks=pytest.mark.slow) for name in list(COMPILED)[1:])]
)
@pytest.mark.parametrize("when", ["compiled first", pytest.param("hooks first", marks=pytest.mark.slow)])
def test_compiled_layers_answer_as_without(name, when):
    torch._dynamo.reset()
    model = six_layers()
    if when == "hooks first":
        TrimmedCache(model)
    COMPILED[name](model)
    check_answers(model, six_layers(), new=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["every layer", "every layer, in place"])
def test_layers_that_ran_compiled_before_there_were_hooks(name):
    torch._dynamo.reset()
    model = six_layers()
    COMPILED[name](model)
    generate(model, random_inputs(model, PAIR), 3)
    check_answers(model, six_layers(), new=3)


def with_layers(order, cross=(1, 3)):
    model = random_model(layers=6, cross_layers=cross)
    layers = layers_of(model)
    model.model.language_model.layers = torch.nn.ModuleList([layers[index] for index in order])
    return model


#: The layers that are left of six, in their new order; 1 and 3 read pictures.
ORDERS = {
    "a self layer removed": [0, 1, 3, 4, 5],
    "the last removed": [0, 1, 2, 3, 4],
    "a cross layer removed": [0, 1, 2, 4, 5],
    "the first cross layer removed": [0, 2, 3, 4, 5],
    "three removed": [0, 1, 3],
    "self layers in another order": [2, 1, 0, 3, 5, 4],
    "cross layers in another order": [0, 3, 2, 1, 4, 5],
    "cross layers at other places": [0, 2, 4, 1, 3, 5],
}


@pytest.mark.parametrize("settings", [{}, {"static": True}], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ORDERS)
def test_removed_and_reordered_layers_answer_as_stock(name, settings):
    model = with_layers(ORDERS[name])
    inputs = random_inputs(model, PAIR)
    stock = generate(model, inputs)
    exact = trimmed(model, inputs, {"top_k_ratio": 1.0, **settings}, disable_compile=True)
    assert torch.equal(exact.sequences, stock.sequences)
    assert largest_difference(exact, stock) <= 1e-5


@pytest.mark.parametrize("name", ORDERS)
def test_the_first_cross_layer_that_runs_chooses(name):
    model = with_layers(ORDERS[name])
    first = next(index for index in ORDERS[name] if index in (1, 3))
    inputs = random_inputs(model, PAIR)
    cache = cache_of(trimmed(model, inputs, {"top_k_ratio": 0.2}, 2))
    assert cache.cross_layers[0] == first
    check_kept(cache.kept_indices, model, inputs, 0.2)
    beams = trimmed(model, inputs, {"top_k_ratio": 0.2}, num_beams=3, num_return_sequences=2)
    assert cache_of(beams).report().kept_tokens == [count for count in cache.report().kept_tokens for _ in range(3)]


def test_removed_layers_hold_nothing_and_wrapped_ones_stay_wrapped(alone):
    model = with_layers([0, 1, 3, 5])
    every(lambda layer: fsdp(checkpoint_wrapper(layer)))(model)
    inputs = random_inputs(model, PAIR)
    stock = generate(model, inputs)
    exact = trimmed(model, inputs, {"top_k_ratio": 1.0})
    assert largest_difference(exact, stock) <= 1e-5
    cache = cache_of(exact)
    assert (cache.cross_layers, cache.self_layers, len(cache.layers)) == ([1, 3], [0, 5], 6)
    assert not any(cache.layers[index].is_initialized for index in (2, 4))
    cache.reset()
    assert largest_difference(generate(model, inputs, cache=cache), stock) <= 1e-5
    assert all(isinstance(layer, FullyShardedDataParallel) for layer in layers_of(model))


@pytest.fixture
def trained():
    """Puts trained copies of modules beside them in a model, as peft does it with `modules_to_save`."""
    peft = pytest.importorskip("peft")

    def put(model, *names):
        config = peft.LoraConfig(r=2, target_modules=r".*language_model.*up_proj", modules_to_save=list(names))
        model = peft.get_peft_model(model, config).eval()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "modules_to_save" in name and weight.ndim == 2:
                    weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
        return model

    return put


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize(
    "name", ["cross_attn", "language_model.layers.1", "language_model.layers.0", "layers.3.cross_attn"]
)
def test_of_copies_in_one_wrapper_the_one_that_runs_is_read(trained, name, attached):
    plain = six_layers()
    if attached:
        TrimmedCache(plain)
    model = trained(plain, name)
    merged = six_layers()
    merged.load_state_dict(copy.deepcopy(model).merge_and_unload().state_dict())
    check_answers(model, merged)
    with model.disable_adapter():
        check_answers(model, six_layers())
    trim_plugin.detach(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_encoded_pictures_are_compared_by_the_copy_that_runs(trained):
    model, processor = load_small_model(torch.float32)
    model = trained(model, "cross_attn")
    merged = copy.deepcopy(model).merge_and_unload()
    pages = [encode_pictures(one, processor, [examples()[0].picture], rule=KCenter(0.2)) for one in (model, merged)]
    assert torch.equal(pages[0].index, pages[1].index)
    with model.disable_adapter():
        other = encode_pictures(model, processor, [examples()[0].picture], rule=KCenter(0.2))
    assert not torch.equal(other.index, pages[0].index)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [2, 1, 0, 3, 5, 4]])
def test_text_alone_in_a_model_with_changed_layers(order):
    model = with_layers(order)
    inputs = random_inputs(model, [Sample((6,))])
    stock, ours = generate(model, inputs), trimmed(model, inputs, {})
    assert torch.equal(ours.sequences, stock.sequences)
    assert largest_difference(ours, stock) <= 1e-5


def test_a_cache_is_not_for_a_model_whose_layers_changed_since():
    model = six_layers()
    cache = TrimmedCache(model)
    model.model.language_model.layers = torch.nn.ModuleList(list(layers_of(model))[:-1])
    with pytest.raises(ValueError, match="made for another model"):
        generate(model, random_inputs(model, PAIR), cache=cache)


def test_what_is_found_lies_inside():
    model = six_layers()
    plain, text_model = list(layers_of(model)), model.model.language_model
    every(lambda layer: checkpoint_wrapper(torch.nn.ModuleDict({"inner": layer})["inner"]))(model)
    layers_of(model).append(torch.nn.Identity())
    assert decoder_layers(text_model) == plain
    assert cross_layers(text_model) == [plain[1], plain[3]]
    assert (parts_of(model).cross_places, parts_of(model).self_places) == ([1, 3], [0, 2, 4, 5])
    assert not has_hooks(text_model)
    TrimmedCache(model)
    assert has_hooks(text_model)
    assert all(layer._forward_pre_hooks for layer in (plain[1], plain[3]))


def test_a_hook_is_itself_in_a_copy_and_nothing_in_a_pickle():
    calls = []
    hook = Hook(lambda *args: calls.append(args))
    assert copy.deepcopy(hook) is hook
    nothing = pickle.loads(pickle.dumps(hook))  # noqa: S301
    assert [nothing(1, (), {}), nothing(1, (), {}, 2), nothing(1, (), 2)] == [None] * 3
    assert calls == []
    hook(1, 2)
    assert calls == [(1, 2)]


def test_an_owner_is_held_weakly_and_left_out_of_a_pickle():
    owner, model = Owner(), torch.nn.Linear(1, 1)
    owner.bind(model, model)
    for copied in (owner, copy.deepcopy(owner)):
        assert copied.bound
        assert copied.text_model() is model
        assert copied.model is model
    left = pickle.loads(pickle.dumps(owner))  # noqa: S301
    assert (left.bound, left.text_model(), left.model) == (False, None, None)
    del model
    assert (owner.bound, owner.text_model(), owner.model) == (True, None, None)
