"""What importing the package loads, in interpreters of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_loads_neither_torch_nor_transformers():
    assert run("import sys, trim_plugin; print('torch' in sys.modules, 'transformers' in sys.modules)") == "False False"


def test_help_loads_neither_torch_nor_transformers():
    program = (
        "import sys; from trim_plugin.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as done: print(done.code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    output = run(program)
    assert output.endswith("0 False False")
    assert all(name in output for name in ("demo", "generate", "eval", "plan"))


NAMED = "from transformers import GenerationConfig; GenerationConfig(cache_implementation='trimmed').validate()"
WRAPPED = "hasattr(GenerationMixin._prepare_cache_for_generation, '_trim_plugin_original')"


@pytest.mark.parametrize(
    "program",
    [
        f"import trim_plugin; {NAMED}",
        f"from transformers import GenerationConfig; import trim_plugin; {NAMED}",
        f"import trim_plugin; from transformers.generation.utils import GenerationMixin; {NAMED}; assert {WRAPPED}",
        f"from transformers.generation.utils import GenerationMixin; import trim_plugin; {NAMED}; assert {WRAPPED}",
        "import trim_plugin; trim_plugin.unregister();"
        f"from transformers.generation.utils import GenerationMixin; assert not {WRAPPED};"
        f"trim_plugin.register(); assert {WRAPPED}; {NAMED}; trim_plugin.unregister(); assert not {WRAPPED}",
        "import trim_plugin; trim_plugin.unregister(); trim_plugin.register();"
        f"from transformers.generation.utils import GenerationMixin; assert {WRAPPED};"
        "assert not hasattr(GenerationMixin._prepare_cache_for_generation._trim_plugin_original, '_trim_plugin_original')",
    ],
)
def test_any_order_of_imports_registers(program):
    run(program)


def test_the_modules_that_were_waited_for_are_as_if_nobody_had():
    program = (
        "import trim_plugin, inspect; from transformers.generation import utils;"
        "assert 'trim_plugin' not in type(utils.__loader__).__module__;"
        "assert utils.__spec__.loader is utils.__loader__; assert 'class GenerationMixin' in inspect.getsource(utils)"
    )
    run(program)


def test_every_public_name_is_there():
    program = "import trim_plugin; print([name for name in trim_plugin.__all__ if not hasattr(trim_plugin, name)])"
    assert run(program) == "[]"
