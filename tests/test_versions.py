"""Versions of transformers that are not there: a package of a few lines is one, and loading it takes no time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIGURATION = """
ALL_CACHE_IMPLEMENTATIONS = ("dynamic",)
class GenerationConfig:
    use_cache = cache_implementation = cache_config = max_cache_len = disable_compile = None
    num_beams = num_return_sequences = prefill_chunk_size = is_assistant = None
    def to_json_string(self, use_diff=True, ignore_metadata=False): ...
    def to_json_file(self, path): ...
    def to_json_string(self, use_diff=True, ignore_metadata=False): ...
    def to_json_file(self, json_file_path): ...
"""
UTILS = """
class GenerationMixin:
    generation_config = None
    def generate(self, **kwargs): return "generated"
    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length): ...
    def _get_candidate_generator(self, input_ids, model_kwargs): ...
    def _prefill(self, input_ids, generation_config, model_kwargs): ...
"""
LAYER = """
class MllamaCrossAttentionDecoderLayer(Base):
    def forward(self, hidden_states, {name}: Cache | None = None, **kwargs) -> None: ...
"""


@pytest.fixture
def invented(tmp_path):
    """Runs a program beside an invented transformers: `invented(version, program, file=text, ...)` → its output, all streams."""

    def run(version, program, **files):
        package = tmp_path / "transformers"
        (package / "generation").mkdir(parents=True, exist_ok=True)
        (package / "models" / "mllama").mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text(f"__version__ = {version!r}\n")
        (package / "generation" / "__init__.py").write_text("")
        (package / "generation" / "configuration_utils.py").write_text(files.get("configuration", CONFIGURATION))
        (package / "generation" / "utils.py").write_text(files.get("utils", UTILS))
        (package / "models" / "mllama" / "modeling_mllama.py").write_text(files.get("mllama", ""))
        (tmp_path / "transformers-0.dist-info").mkdir(exist_ok=True)
        metadata = f"Metadata-Version: 2.1\nName: transformers\nVersion: {version}\n"
        (tmp_path / "transformers-0.dist-info" / "METADATA").write_text(metadata)
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
            cwd=tmp_path,
        )
        return done.stdout + done.stderr

    return run


def test_a_newer_version_warns_once_and_works_if_the_contract_holds(invented):
    program = (
        "import trim_plugin; from transformers.generation import utils\n"
        "print(hasattr(utils.GenerationMixin._prefill, '_trim_plugin_original'))\n"
        "trim_plugin.compat.require_supported_transformers()"
    )
    for version in ("5.25.0", "6.1.0"):
        output = invented(version, program)
        assert output.count("UserWarning: trim_plugin was tested with transformers 5.17 to 5.24, and " + version) == 1
        assert "True" in output
        assert "Error" not in output


def test_an_older_version_is_refused_when_the_package_is_imported(invented):
    assert (
        "UnsupportedTransformersError: trim_plugin hooks into transformers 5.17 to 5.24, but 5.16.9 is installed"
        in (invented("5.16.9", "import trim_plugin"))
    )


LATER = "import trim_plugin\nfrom transformers.generation.utils import GenerationMixin\nprint(GenerationMixin().generate())\n"
BROKEN = UTILS.replace("_prefill", "_read_prompt")


def test_transformers_that_is_loaded_later_can_be_used_without_a_trimmed_cache(invented):
    output = invented("5.25.0", LATER + "GenerationMixin().generate(cache_implementation='trimmed')", utils=BROKEN)
    assert "UserWarning: trim_plugin cannot hook into transformers 5.25.0" in output
    assert "\ngenerated\n" in f"\n{output}"
    last = output.strip().splitlines()[-1]
    assert last.startswith(
        "trim_plugin.compat.UnsupportedTransformersError: trim_plugin cannot hook into transformers 5.25.0"
    )
    assert "did not find: GenerationMixin._prefill. Supported is transformers 5.17 to 5.24. Install" in last


def test_transformers_that_is_loaded_already_is_refused_when_the_package_is_imported(invented):
    last = invented(
        "5.25.0", "from transformers.generation import utils\nimport trim_plugin", utils=BROKEN
    ).splitlines()[-1]
    assert "UnsupportedTransformersError" in last
    assert "GenerationMixin._prefill" in last


@pytest.mark.parametrize("what", ["configuration", "utils"])
def test_whole_modules_that_are_empty_are_named_too(invented, what):
    assert "generated" in (
        output := invented("5.24.0", LATER, **{what: UTILS if what == "utils" else "class GenerationConfig: ..."})
    )
    assert ("ALL_CACHE_IMPLEMENTATIONS, a tuple" in output) is (what == "configuration")


@pytest.mark.parametrize(
    ("version", "source", "name"),
    [
        ("5.24.0", LAYER.format(name="cache"), "cache"),
        ("5.24.0.dev0", LAYER.format(name="past_key_values"), "past_key_values"),
        ("5.23.0", "", "past_key_values"),
        ("5.24.1", "", "cache"),
    ],
)
def test_the_caches_name_is_what_the_layers_say_and_else_the_versions(invented, version, source, name):
    program = "import sys, trim_plugin.compat; print(trim_plugin.compat.CACHE, 'transformers' in sys.modules)"
    assert invented(version, program, mllama=source).splitlines()[-1] == f"{name} False"
