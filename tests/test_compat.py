import importlib.metadata

import pytest
from packaging.version import Version

from trim_plugin import compat


@pytest.mark.parametrize("version", ["5.17", "5.17.0rc1", "5.17.0.dev0", "5.23.0", "5.99.1"])
def test_supported(version):
    compat.require_supported_transformers(version)


@pytest.mark.parametrize("version", ["4.57.1", "5.16.9", "6.0.0", "6.0.0rc1", "7.1"])
def test_unsupported(version):
    with pytest.raises(ImportError, match=rf"but {version} is installed"):
        compat.require_supported_transformers(version)


def test_what_depends_on_the_version_is_read_from_transformers_itself():
    """Both differences came between 5.17 and 5.23: the oldest version has neither, the newest both."""
    installed = Version(importlib.metadata.version("transformers"))
    found = (compat.slices_mask_rows(), compat.compiles_mllama_decoding())
    if installed < Version("5.18"):
        assert found == (False, False)
    if installed >= Version("5.23"):
        assert found == (True, True)
