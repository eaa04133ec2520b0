"""What the scripts of continuous integration say, without an index and without an environment of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from trim_plugin.compat import NEWEST, OLDEST

ROOT = Path(__file__).parents[1]
TESTED = re.search(r"^transformers==(.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[1]

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts need bash")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (f"echo 'transformers ({TESTED})'", f"transformers {TESTED} was tested, and is the newest"),
        ("echo 'transformers (5.9.0)'", f"transformers {TESTED} was tested, and is the newest"),
        ("echo 'transformers (5.100.0)'; echo more", "NOTE: transformers 5.100.0 is out"),
        ("echo 'no network' >&2; exit 1", f"transformers {TESTED} was tested; no index could be asked"),
        ("echo 'something else'", f"transformers {TESTED} was tested; no index could be asked"),
    ],
)
def test_a_newer_release_is_told_and_nothing_fails(tmp_path, answer, said):
    stub = tmp_path / "python3"
    stub.write_text(f"#!/bin/sh\n{answer}\n")
    stub.chmod(0o755)
    done = subprocess.run(
        ["bash", ROOT / ".ci" / "newest"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
    )
    assert done.returncode == 0
    assert done.stdout.startswith(said)


def test_the_core_suite_runs_on_the_oldest_release_and_on_the_last_with_the_former_name():
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "constraints-$which.txt" in run
    for which, series in (("oldest", OLDEST), ("previous", "5.23"), ("newest", None)):
        assert which in run
        if series is not None:
            assert f"\ntransformers=={series}." in (ROOT / f"constraints-{which}.txt").read_text(encoding="utf-8")
    assert TESTED.startswith(f"{NEWEST}.")
