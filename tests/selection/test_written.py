"""Rules as JSON: what is written makes an equal rule again, and what cannot come back is not written."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import pytest

from trim_plugin import KCenter, TopKPerHead, TopPPerHead, VisualTokenProcessor
from trim_plugin.selection.written import read_rule, shown, written


class Plain(VisualTokenProcessor):
    """Made without arguments."""

    def __call__(self, scores, visible):
        return scores


class Counted(Plain):
    """Says what it was made with."""

    def __init__(self, minimum=4, names=()):
        self.minimum, self.names = minimum, list(names)

    @property
    def arguments(self):
        return {"minimum": self.minimum, "names": self.names}


class Silent(Plain):
    """Does not."""

    def __init__(self, minimum):
        self.minimum = minimum


class Forgetful(Plain):
    """Remembers something on the way."""

    def __call__(self, scores, visible):
        self.seen = scores
        return scores


class Own(KCenter):
    """Inherits what it is made with."""


class Narrower(KCenter):
    """Takes other arguments than it says."""

    def __init__(self):
        super().__init__(0.1)


class Rounding(Counted):
    """Makes something else of what it is given."""

    def __init__(self, minimum):
        super().__init__(minimum + 1)

    @property
    def arguments(self):
        return {"minimum": self.minimum}


class Called:
    """Is no VisualTokenProcessor."""

    def __call__(self, scores, visible):
        return scores

    class Inner(Plain):
        pass


def function(scores, visible):
    return scores


HERE = __name__


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (TopKPerHead(0.15), {"rule": "TopKPerHead", "ratio": 0.15}),
        (TopPPerHead(1), {"rule": "TopPPerHead", "mass": 1.0}),
        (KCenter(0.1), {"rule": "KCenter", "kept_share": 0.1}),
        (KCenter(radius=0.2), {"rule": "KCenter", "radius": 0.2}),
        (Plain(), {"rule": f"{HERE}:Plain"}),
        (Called.Inner(), {"rule": f"{HERE}:Called.Inner"}),
        (Counted(8, ["a"]), {"rule": f"{HERE}:Counted", "minimum": 8, "names": ["a"]}),
        (Own(0.1), {"rule": f"{HERE}:Own", "kept_share": 0.1}),
        (function, {"rule": f"{HERE}:function"}),
    ],
    ids=lambda given: given["rule"] if isinstance(given, dict) else "",
)
def test_a_rule_comes_back_equal(rule, expected):
    assert written(rule) == expected == shown(rule)
    again = read_rule(json.loads(json.dumps(written(rule))))
    assert again == rule
    assert type(again) is type(rule)
    assert hash(again) == hash(rule)


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        (lambda scores, visible: scores, "no program could find it by its name"),
        (type("Local", (Plain,), {})(), "no program could find it by its name"),
        (functools.partial(function), "neither a function nor a VisualTokenProcessor"),
        (Called(), "neither a function nor a VisualTokenProcessor"),
        (Called().__call__, "no program could find it by its name"),
        (Silent(3), "Give its class a property `arguments`"),
        (Narrower(), "do not come back"),
        (Rounding(3), "make another one"),
        (Counted(object()), "do not come back"),
        (Counted(float("nan")), "do not come back"),
    ],
)
def test_a_rule_that_cannot_come_back_is_not_written(rule, why):
    with pytest.raises(ValueError, match=f"The visual token processor .* cannot be saved: .*{why}"):
        written(rule)
    assert shown(rule) == repr(rule)


def test_a_rule_that_remembers_something_is_not_written():
    rule = Forgetful()
    assert written(rule) == {"rule": f"{HERE}:Forgetful"}
    rule(1, 2)
    with pytest.raises(ValueError, match="Give its class a property `arguments`"):
        written(rule)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"kept_share": 0.1}, "names itself as 'rule'"),
        ({"rule": 3}, "names itself as 'rule'"),
        ({"rule": "KCentre"}, "Unknown rule 'KCentre'.*Shipped: TopKPerHead, TopPPerHead, KCenter"),
        ({"rule": "KCenter"}, "'KCenter' cannot be made with {}: KCenter takes either"),
        ({"rule": "KCenter", "ratio": 0.1}, "cannot be made with .*unexpected keyword argument"),
        ({"rule": "TopKPerHead", "ratio": 3}, r"ratio must be a number in \(0, 1\], got 3"),
        ({"rule": "no_such_module:Mine"}, "not imported.*`import no_such_module`"),
        ({"rule": f"{HERE}:Gone"}, f"the module {HERE} has no such name"),
        ({"rule": f"{HERE}:Called"}, "neither a VisualTokenProcessor nor a function"),
        ({"rule": "subprocess:Popen", "args": ["true"]}, "neither a VisualTokenProcessor nor a function"),
        ({"rule": "trim_plugin:VisualTokenProcessor"}, "cannot be made"),
        ({"rule": f"{HERE}:function", "minimum": 3}, "is a function and takes no arguments"),
        ({"rule": ":"}, "not imported"),
    ],
)
def test_what_is_no_rule_says_so(saved, message):
    with pytest.raises(ValueError, match=message):
        read_rule(saved)


def test_a_program_is_asked_to_import_its_rules_and_to_put_them_into_modules(tmp_path):
    (tmp_path / "planted.py").write_text("print('ran')")
    program = (
        "import trim_plugin; from trim_plugin.selection.written import read_rule, written\n"
        "try: read_rule({'rule': 'planted:Rule'})\n"
        "except ValueError as error: print(error)\n"
        "class Mine(trim_plugin.VisualTokenProcessor):\n"
        "    def __call__(self, scores, visible): return scores\n"
        "try: written(Mine())\n"
        "except ValueError as error: print(error)"
    )
    # The interpreter finds modules in the folder that it is started in, where a downloaded model may lie.
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    reading, writing = done.stdout.splitlines()
    assert reading.endswith("write `import planted` before.")
    assert "Mine cannot be saved: no program could find it by its name" in writing


def test_rules_are_equal_if_they_are_made_alike():
    assert TopKPerHead(0.5) == TopKPerHead(0.5) != TopKPerHead(0.25)
    assert TopKPerHead(0.5) != TopPPerHead(0.5)
    assert KCenter(0.5) == KCenter(0.5) != KCenter(radius=0.5)
    assert Own(0.5) != KCenter(0.5) != Own(0.5)
    assert Plain() == Plain() != Called.Inner()
    one = Silent(3)
    assert one == one != Silent(3)
    assert len({TopKPerHead(0.5), TopKPerHead(0.5), TopKPerHead(0.25), one}) == 3
