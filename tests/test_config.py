import copy
import dataclasses
import pickle

import pytest

from trim_plugin import KCenter, TopPPerHead, TrimConfig
from trim_plugin.config import DEFAULT_KEPT_SHARE


def test_defaults():
    config = TrimConfig()
    assert config.top_k_ratio is None
    assert config.processors is None
    assert not config.exact
    (rule,) = config.processor_list
    assert isinstance(rule, KCenter)
    assert rule.kept_share == DEFAULT_KEPT_SHARE == 0.35
    assert TrimConfig.of(config.to_dict()) == config


def test_ratio_one_is_exact_and_has_no_processors():
    config = TrimConfig(top_k_ratio=1.0)
    assert config.exact
    assert list(config.processor_list) == []


def test_processors_replace_the_default_list():
    processor = TopPPerHead(0.9)
    config = TrimConfig(processors=[processor])
    assert list(config.processor_list) == [processor]
    assert config.top_k_ratio is None
    assert not config.exact


def test_of_takes_dicts_and_configs_and_leaves_them_alone():
    settings = {"top_k_ratio": 0.5}
    config = TrimConfig.of(settings)
    assert config == TrimConfig(top_k_ratio=0.5)
    assert settings == {"top_k_ratio": 0.5}
    assert TrimConfig.of(config) is config
    assert TrimConfig.of(None) == TrimConfig()


def test_frozen_and_its_own_deep_copy():
    config = TrimConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k_ratio = 0.5
    assert copy.deepcopy(config) is config


def test_what_follows_from_settings_is_worked_out_once_and_is_not_saved():
    assert TrimConfig.of(None) is TrimConfig.of(None)
    config = TrimConfig(top_k_ratio=0.2)
    plain = dict(vars(config))
    assert config.processor_list is config.processor_list
    assert config.needs_scores
    assert not config.exact
    again = pickle.loads(pickle.dumps(config))  # noqa: S301
    assert (again, vars(again)) == (config, plain)
    other = dataclasses.replace(config, top_k_ratio=1.0)
    assert (list(other.processor_list), other.exact, other.needs_scores) == ([], True, False)
