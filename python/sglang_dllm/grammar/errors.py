"""Forms that cannot be served."""

from __future__ import annotations


class FormError(ValueError):
    """A form is wrong or too large. The message is for the client."""
