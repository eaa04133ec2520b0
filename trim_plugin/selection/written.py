"""Rules as JSON has them, so that settings can be saved with a model and come back equal.

A shipped rule is written by its class, one of one's own by the place where Python finds it:

    {"rule": "KCenter", "kept_share": 0.1}
    {"rule": "my_rules:TwoHeadsAgree", "minimum": 8}
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping
from types import FunctionType
from typing import Any

from trim_plugin.selection.k_center import KCenter
from trim_plugin.selection.processors import (
    ProcessorLike,
    TopKPerHead,
    TopPPerHead,
    VisualTokenProcessor,
    processor_name,
)

SHIPPED: dict[str, type[VisualTokenProcessor]] = {rule.__name__: rule for rule in (TopKPerHead, TopPPerHead, KCenter)}


def written(rule: ProcessorLike) -> dict[str, Any]:
    """Write a rule as a dict that JSON can hold and `read_rule` makes an equal one of.

    Raises:
        ValueError: a rule of one's own that no other program could find or make again; the message says why.

    Example:
        >>> written(KCenter(radius=0.2))
        {'rule': 'KCenter', 'radius': 0.2}
        >>> written(lambda scores, visible: scores)
        Traceback (most recent call last):
        ...
        ValueError: The visual token processor <lambda> cannot be saved: no program could find it by its name. ...
    """
    # What a name stands for is a class, or the function itself.
    named: Any = rule if isinstance(rule, FunctionType) else type(rule)
    if named in SHIPPED.values():
        name = named.__name__
    else:
        name = f"{named.__module__}:{named.__qualname__}"
        if named.__module__ == "__main__" or _found(name) is not named:
            raise _unsavable(rule, "no program could find it by its name. Put it at the top level of a module")
    if named is rule:
        return {"rule": name}
    if not isinstance(rule, VisualTokenProcessor):
        raise _unsavable(rule, "it is neither a function nor a VisualTokenProcessor. Derive its class from that")
    if rule.arguments is None:
        raise _unsavable(
            rule,
            "it does not say what it was made with. Give its class a property `arguments`: the keyword arguments that make an "
            "equal one",
        )
    saved = {"rule": name, **rule.arguments}
    try:
        again = read_rule(json.loads(json.dumps(saved, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise _unsavable(rule, f"its arguments {dict(rule.arguments)} do not come back ({error})") from error
    if again != rule:
        raise _unsavable(rule, f"its arguments {dict(rule.arguments)} make another one after JSON has held them")
    return saved


def read_rule(saved: Mapping[str, Any]) -> ProcessorLike:
    """Make the rule that `written` has written.

    Settings may come with a downloaded model, so they import nothing: a rule of one's own is looked up in a module that the
    program has imported, and must be a function or a `VisualTokenProcessor`.

    Raises:
        ValueError: there is no such rule, it is not imported, or it does not take these arguments.

    Example:
        >>> read_rule({"rule": "TopPPerHead", "mass": 0.9})
        TopPPerHead(0.9)
        >>> read_rule({"rule": "KCentre", "kept_share": 0.1})
        Traceback (most recent call last):
        ...
        ValueError: Unknown rule 'KCentre' in processors. Shipped: TopKPerHead, TopPPerHead, KCenter; ...
    """
    name = saved.get("rule")
    arguments = {key: value for key, value in saved.items() if key != "rule"}
    if not isinstance(name, str):
        raise ValueError(
            "A rule among processors that is written as a dict names itself as 'rule', for instance "
            f"{{'rule': 'KCenter', 'kept_share': 0.1}}, got {dict(saved)!r}."
        )
    rule = SHIPPED.get(name) or _own(name)
    if isinstance(rule, FunctionType):
        if arguments:
            raise ValueError(f"The rule {name!r} is a function and takes no arguments, got {arguments!r}.")
        return rule
    try:
        return rule(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The rule {name!r} cannot be made with {arguments!r}: {error}") from error


def shown(rule: ProcessorLike) -> dict[str, Any] | str:
    """A rule as `written` writes it; one that cannot be saved as its `repr`, to be looked at.

    Example:
        >>> shown(TopKPerHead(0.5))
        {'rule': 'TopKPerHead', 'ratio': 0.5}
        >>> shown(lambda scores, visible: scores)
        '<function <lambda> at 0x...>'
    """
    try:
        return written(rule)
    except ValueError:
        return repr(rule)


def _own(name: str) -> type[VisualTokenProcessor] | FunctionType:
    module, colon, _ = name.partition(":")
    if not colon:
        raise ValueError(
            f"Unknown rule {name!r} in processors. Shipped: {', '.join(SHIPPED)}; one of your own is written 'module:name'."
        )
    if module not in sys.modules:
        raise ValueError(
            f"The rule {name!r} lies in a module that is not imported. Settings may come from a downloaded file, so they "
            f"import nothing by themselves: write `import {module}` before."
        )
    found = _found(name)
    if found is None:
        raise ValueError(f"There is no rule {name!r}: the module {module} has no such name.")
    is_rule = inspect.isclass(found) and issubclass(found, VisualTokenProcessor)
    if not (is_rule or isinstance(found, FunctionType)):
        raise ValueError(f"{name!r} is no rule: it is neither a VisualTokenProcessor nor a function.")
    return found


def _found(name: str) -> Any:
    """What a name 'module:name.name' stands for in the modules that are imported; None if nothing."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _unsavable(rule: ProcessorLike, why: str) -> ValueError:
    return ValueError(f"The visual token processor {processor_name(rule)} cannot be saved: {why}.")
