"""The registry of mutants: bugs applied from outside, while a context is open.

A mutant edits the source of one product method, or replaces the method. Invariant: the product
holds no switch for any of them, and an edit whose text the product no longer has is an error.
"""

import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import FunctionType, ModuleType
from typing import Any

Patch = Callable[[ExitStack], None]


@dataclass(slots=True, frozen=True)
class Mutant:
    """`features`: the scenarios in which it is found soonest; None: the drawn ones."""

    name: str
    apply: Patch
    features: frozenset[str] | None


_MUTANTS: dict[str, Mutant] = {}


def all_mutants() -> dict[str, Mutant]:
    """Every mutant by name."""
    for module in ("ledger", "placing", "batching", "journal", "fleet", "transfers", "steering"):
        import_module(f"tests.sim.mutants.{module}")
    return _MUTANTS


def mutant(*features: str) -> Callable[[Patch], Patch]:
    """Registers a patch under its function's name."""

    def register(apply: Patch) -> Patch:
        name = apply.__name__
        assert name not in _MUTANTS
        _MUTANTS[name] = Mutant(name, apply, frozenset(features) if features else None)
        return apply

    return register


def replace(stack: ExitStack, owner: type | ModuleType, name: str, new: object) -> None:
    """Sets an attribute of a class or module until the stack closes."""
    old = owner.__dict__[name]
    setattr(owner, name, new)
    stack.callback(setattr, owner, name, old)


def edit(stack: ExitStack, owner: type | ModuleType, name: str, old: str, new: str) -> None:
    """Replaces `old`, which the method's source must hold exactly once, by `new`."""
    attribute = owner.__dict__[name]
    function = attribute.fget if isinstance(attribute, property) else attribute
    assert isinstance(function, FunctionType)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{owner.__name__}.{name} has {source.count(old)} of {old!r}"
    found: dict[str, Any] = {}
    exec(
        compile(source.replace(old, new), f"<{name}, mutated>", "exec"), function.__globals__, found
    )
    replace(stack, owner, name, found[name])


@contextmanager
def mutated(name: str | None) -> Iterator[None]:
    """The product with one bug; None: as it is."""
    with ExitStack() as stack:
        if name is not None:
            all_mutants()[name].apply(stack)
        yield
