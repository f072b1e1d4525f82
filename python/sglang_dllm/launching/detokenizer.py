"""The detokenizer process of a server, from its first moment."""

from __future__ import annotations

import multiprocessing
import sys
from typing import Any


def run_detokenizer(server_args: Any, port_args: Any) -> None:
    """Run SGLang's detokenizer, or end if the launching process has ended.

    SGLang asks the system to end this process with its parent once SGLang is imported.
    A launching process that is killed in those seconds is not noticed: SGLang's
    detokenizer would wait for its next text for ever.

    Raises:
        SystemExit: the parent has gone; with status 1.
    """
    from sglang.srt.managers.detokenizer_manager import run_detokenizer_process
    from sglang.srt.utils.common import kill_itself_when_parent_died

    # In this order: a parent that ends between the two is noticed too.
    kill_itself_when_parent_died()
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        sys.exit(1)
    run_detokenizer_process(server_args, port_args)
