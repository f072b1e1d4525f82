"""The versions of SGLang: those that are tested, and how another one stands to them.

A version decides nothing. The contract (``upstream.contract``) decides whether a launch
of one of our models goes on; a version that is not tested is named in a warning.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Literal

from packaging.version import InvalidVersion, Version

from sglang_dllm import SUPPORTED_SGLANG

OLDEST, NEWEST = SUPPORTED_SGLANG
RANGE = f"{OLDEST} to {NEWEST}"
BROKEN = "0.5.19"
"""A version between the ends that has neither the old hooks' targets nor the new
extension points."""
REQUIREMENT = f"sglang>={OLDEST},!={BROKEN},<={NEWEST}"

Standing = Literal["tested", "untested", "outside"]


def installed() -> str:
    """The version of the installed SGLang.

    Raises:
        importlib.metadata.PackageNotFoundError: there is none.
    """
    return version("sglang")


def standing(found: str) -> Standing:
    """How a version stands to the tested ones.

    Returns:
        ``tested`` for one of the two ends, with any local part (``+cu130``).
        ``untested`` for one between them, a post or development release of an end
        too. ``outside`` for all others, those that are no version number too.
    """
    try:
        parsed = Version(found)
    except InvalidVersion:
        return "outside"
    if parsed.public in SUPPORTED_SGLANG:
        return "tested"
    is_inside = Version(OLDEST).release <= parsed.release <= Version(NEWEST).release
    return "untested" if is_inside else "outside"


def describe(found: str) -> str:
    """One line about how a version stands to the tested ones."""
    match standing(found):
        case "tested":
            return f"{found}, tested (sglang-dllm supports {RANGE})"
        case "untested":
            return f"{found}, untested: between {OLDEST} and {NEWEST}, which are tested"
    return f"{found}, untested: outside of the supported {RANGE}"
