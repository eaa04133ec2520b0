import importlib.metadata
import re
import tomllib
import warnings
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from transformers.modeling_outputs import CausalLMOutputWithPast

from trim_plugin import compat

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("version", ["5.17", "5.17.0rc1", "5.17.0.dev0", "5.23.0", "5.24.0", "5.24.3"])
def test_supported(version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.require_supported_transformers(version)


@pytest.mark.parametrize("version", ["4.57.1", "5.16.9", "5.16.9.post1"])
def test_unsupported_transformers(version):
    with pytest.raises(
        ImportError, match=rf"hooks into transformers 5.17 to 5.24, but {re.escape(version)} is installed"
    ):
        compat.require_supported_transformers(version)


@pytest.mark.parametrize("version", ["5.25.0.dev0", "5.25.0", "5.99.1", "6.0.0rc1", "7.1"])
def test_untested(version):
    with pytest.warns(UserWarning, match=f"tested with transformers 5.17 to 5.24, and {version} is installed"):
        compat.require_supported_transformers(version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.require_supported_transformers(version)


def test_the_bounds_are_written_alike_everywhere():
    """In compat, in the package's requirements, and in the files of what was tested."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    allowed = next(one for one in project["dependencies"] if one.startswith("transformers")).removeprefix(
        "transformers"
    )
    assert SpecifierSet(allowed) == SpecifierSet(f">={compat.OLDEST},<{compat.FIRST_UNTESTED}")
    for file, series in (("constraints.txt", compat.NEWEST), ("constraints-oldest.txt", compat.OLDEST)):
        pinned = re.search(r"^transformers==(.*)$", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
        assert pinned[1].startswith(f"{series}."), file
    major, minor = Version(compat.NEWEST).release
    assert Version(compat.FIRST_UNTESTED).release == (major, minor + 1)


def test_the_cache_is_found_by_both_names_and_the_newer_one_wins():
    assert compat.cache_of({compat.CACHE: None, "past_key_values": 1}) is (None if compat.CACHE == "cache" else 1)
    assert compat.cache_of({"past_key_values": 1}) == 1
    assert compat.cache_of({"hidden_states": 1}) is None


def test_an_output_is_asked_without_a_deprecation(caplog):
    """transformers logs the older name's use once a process; an output without a cache is not asked for it."""
    logger = "transformers.utils.generic"
    with caplog.at_level("WARNING", logger=logger):
        assert compat.cache_of(CausalLMOutputWithPast(**{compat.CACHE: 1}, logits=2)) == 1
        assert compat.cache_of(CausalLMOutputWithPast(logits=2)) is None
    assert not caplog.records


def test_what_depends_on_the_version_is_read_from_transformers_itself():
    """Both differences came between 5.17 and 5.23: the oldest version has neither, the newest both."""
    installed = Version(importlib.metadata.version("transformers"))
    found = (compat.slices_mask_rows(), compat.compiles_mllama_decoding())
    if installed < Version("5.18"):
        assert found == (False, False)
    if installed >= Version("5.23"):
        assert found == (True, True)
