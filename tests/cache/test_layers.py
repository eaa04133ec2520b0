import pytest
import torch

from trim_plugin.cache.layers import CrossAttentionLayer, take_tokens


def filled(*shapes: tuple[int, ...]) -> tuple[CrossAttentionLayer, list[torch.Tensor]]:
    """A layer that pictures of these shapes were given to, and their keys."""
    layer, given = CrossAttentionLayer(), []
    for shape in shapes:
        given.append(torch.randn(shape))
        layer.expected = True
        layer.update(given[-1], 2 * given[-1])
    return layer, given


def test_nothing_is_taken_without_a_hook_that_expects_it():
    layer = CrossAttentionLayer()
    with pytest.raises(RuntimeError, match="no trim_plugin hooks"):
        layer.update(torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4))
    layer, _ = filled((1, 2, 5, 4))
    with pytest.raises(RuntimeError, match="no trim_plugin hooks"):  # one update for each time it is expected
        layer.update(torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4))


def test_the_first_picture_is_taken_without_a_copy_and_later_ones_follow():
    layer, (keys,) = filled((1, 2, 5, 4))
    assert layer.keys is keys
    layer, (first, second) = filled((1, 2, 5, 4), (1, 2, 3, 4))
    assert torch.equal(layer.keys, torch.cat([first, second], dim=2))
    assert torch.equal(layer.values, 2 * layer.keys)


def test_every_sample_keeps_its_own_tokens():
    layer, (keys,) = filled((2, 2, 5, 4))
    layer.keep(torch.tensor([[0, 3], [4, 4]]))
    assert torch.equal(layer.keys[0], keys[0][:, [0, 3]])
    assert torch.equal(layer.keys[1], keys[1][:, [4, 4]])
    assert torch.equal(layer.values, 2 * layer.keys)
    assert layer.get_seq_length() == 2


@pytest.mark.parametrize("first", [0, 5])
def test_what_a_forward_has_brought_is_replaced_and_nothing_before_it(first):
    layer, given = filled((1, 2, 5, 4), (1, 2, 3, 4))
    means = torch.randn(1, 2, 2, 4)
    layer.replace(first, means, 2 * means)
    assert torch.equal(layer.keys, means if first == 0 else torch.cat([given[0], means], dim=2))
    assert torch.equal(layer.values, 2 * layer.keys)


def test_taking_text_back_leaves_the_picture():
    layer, (keys,) = filled((1, 2, 5, 4))
    layer.crop(-3)
    layer.crop(1)
    assert layer.keys is keys


def test_settled_keys_lie_head_by_head():
    layer = CrossAttentionLayer()
    layer.expected = True
    projected = torch.randn(1, 5, 2, 4).transpose(1, 2)  # token by token, as a projection returns them
    layer.update(projected, projected)
    assert not layer.keys.is_contiguous()
    layer.settle()
    assert layer.keys.is_contiguous()
    assert layer.values.is_contiguous()
    assert torch.equal(layer.keys, projected)


@pytest.mark.parametrize("shape", [(1, 6, 3), (2, 6, 3), (1, 2, 6, 3), (3, 2, 6, 3)])
def test_tokens_are_picked_along_the_second_last_dimension(shape):
    tensor, positions = torch.randn(shape), torch.randint(6, (shape[0], 4))
    expected = torch.stack([sample[..., picked, :] for sample, picked in zip(tensor, positions, strict=True)])
    assert torch.equal(take_tokens(tensor, positions), expected)
