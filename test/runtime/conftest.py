"""The configuration that SGLang's requests and pools read of their process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="package")
def published_config() -> Iterator[None]:
    """SGLang's defaults, while the tests of this folder run."""
    from sglang.srt.runtime_context import get_context

    with get_context().override_server_args():
        yield
