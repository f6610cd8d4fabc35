"""What can go wrong, and what to do about it.

    EdgeIBTMError            exit 1: a stage failed
    +-- UsageError           exit 2: the request cannot be carried out as it was made (unknown name, bad value, bad file)
    |   +-- CannotRunHere    exit 2: a sound artifact that this host has no means to run
    +-- GateError            exit 1: a verification gate was missed
    +-- DeviceError          exit 1: a phone, emulator or runner did not do its part

Every message says what was wrong, with what value, and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from numbers import Integral
from typing import TypeVar

T = TypeVar("T")


class EdgeIBTMError(Exception):
    """A stage failed; the message is one line for the user."""

    exit_code = 1


class UsageError(EdgeIBTMError, ValueError):
    """The request itself is wrong."""

    exit_code = 2


class CannotRunHere(UsageError):
    """Nothing is known to be wrong with an artifact, but this host cannot run it."""


class GateError(EdgeIBTMError):
    """An artifact or a stage missed a gate that was set for it."""


class DeviceError(EdgeIBTMError):
    """A device, its connection or its runner failed."""


def suggest(name: str, known: list[str]) -> str:
    """`did you mean 'x'?` or the list of what is known."""
    near = get_close_matches(name, known, n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(repr(n) for n in near) + "?"
    return "known: " + ", ".join(sorted(known))


def refuse(given: Mapping[str, object], why: str) -> None:
    """UsageError that names the options that were typed (value not None), followed by `why` they do not apply."""
    typed = [option for option, value in given.items() if value is not None]
    if typed:
        raise UsageError(f"{', '.join(typed)}: {why}")


def check_count(what: str, value: object) -> None:
    """UsageError unless `value` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise UsageError(f"{what} is {value!r}; give at least 1, a whole number")


def lookup(kind: str, name: str, registry: Mapping[str, T]) -> T:
    """Return `registry[name]`, or raise UsageError that offers near names."""
    if name in registry:
        return registry[name]
    raise UsageError(f"unknown {kind} {name!r}; {suggest(name, list(registry))}")
