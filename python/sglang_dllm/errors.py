"""The package's error types: what the user got wrong, what SGLang changed."""


class ConfigError(ValueError):
    """A launch flag, a YAML key or a checkpoint field is wrong."""


class RequestError(ValueError):
    """A request field is wrong; the HTTP layer answers 400 with the message."""


class UpstreamContractError(RuntimeError):
    """SGLang does not look as a hook expects it."""
