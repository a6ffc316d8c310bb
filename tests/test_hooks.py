"""The hooks that the package hangs on: all of them listed, all of them there."""

import ast
import importlib
import inspect
from importlib.metadata import version
from pathlib import Path

import pytest

import peft_subspace
from hooks import IMPORTED, OVERRIDDEN, Hook
from peft_subspace.tuner.config import SubspaceConfig
from peft_subspace.tuner.layer import SubspaceLayer
from peft_subspace.tuner.model import SubspaceModel
from peft_subspace.tuner.parameter_layer import ParameterLayer

PACKAGE = Path(peft_subspace.__file__).parent
OTHERS = ("peft", "transformers")


def found(path):
    """What a dotted path leads to."""
    names = path.split(".")
    for end in range(len(names), 0, -1):
        try:
            place = importlib.import_module(".".join(names[:end]))
        except ModuleNotFoundError:
            continue
        for name in names[end:]:
            place = inspect.getattr_static(place, name)
        return place
    raise AttributeError(path)


def what_changed(hook):
    """One sentence on what a hook has become; None if it is as it was."""
    package = hook.path.partition(".")[0]
    subject = f"{package} {version(package)}"
    try:
        place = found(hook.path)
    except AttributeError:
        return f"{subject} has no {hook.path} any more, which the package uses for: {hook.use}."
    if hook.arguments:
        parameters = inspect.signature(getattr(place, "__func__", place)).parameters
        names = tuple(name for name in parameters if name not in ("self", "cls"))
        if names[: len(hook.arguments)] != hook.arguments:
            return (
                f"{hook.path} of {subject} takes {names}, and not first {hook.arguments}, which the "
                f"package counts on for: {hook.use}."
            )
    return None


@pytest.mark.parametrize("hook", IMPORTED + OVERRIDDEN, ids=lambda hook: hook.path)
def test_hook_is_as_it_was(hook):
    assert not what_changed(hook)


def imported():
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                tuple(f"{o}." for o in OTHERS)
            ):
                yield from (f"{node.module}.{name.name}" for name in node.names)


def overridden():
    for own in (SubspaceModel, SubspaceLayer, ParameterLayer, SubspaceConfig):
        for cls in own.__mro__:
            for name in vars(cls) if cls.__module__.startswith("peft_subspace") else ():
                for base in cls.__mro__[1:]:
                    if base.__module__.startswith("peft.") and name in vars(base) and name[:2] != "__":
                        if name != "_abc_impl":
                            yield f"{base.__module__}.{base.__qualname__}.{name}"
                        break


def test_all_hooks_are_listed():
    assert {hook.path for hook in IMPORTED} == set(imported())
    assert {hook.path for hook in OVERRIDDEN} == set(overridden())


def test_a_change_is_told_in_a_sentence():
    gone = what_changed(Hook("peft.utils.constants.NOTHING", "an example"))
    assert "has no peft.utils.constants.NOTHING any more, which the package uses for: an example." in gone
    other = what_changed(Hook("peft.utils.get_quantization_kwargs", "an example", ("layer",)))
    assert "takes ('model',), and not first ('layer',), which the package counts on for: an example." in other
