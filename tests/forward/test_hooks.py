import trim_plugin
from trim_plugin.forward.hooks import after_layer, attach, before_layer


def hooks_of(model):
    layers = model.model.language_model.layers
    return [hook for layer in layers for hook in (*layer._forward_pre_hooks.values(), *layer._forward_hooks.values())]


def test_hooks_are_attached_once_and_detached_wholly(model):
    own = lambda *_: None  # noqa: E731
    model.model.language_model.layers[1].register_forward_pre_hook(own)
    attach(model)
    attach(model)
    assert hooks_of(model) == [own, before_layer, after_layer, before_layer, after_layer]
    trim_plugin.detach(model)
    assert hooks_of(model) == [own]
    assert not any(layer._forward_hooks_with_kwargs for layer in model.model.language_model.layers)
    trim_plugin.detach(model)
