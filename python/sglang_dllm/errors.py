"""The package's error types: what the user got wrong, what SGLang changed."""


class ConfigError(ValueError):
    """A launch flag, a YAML key or a checkpoint field is wrong."""


class RequestError(ValueError):
    """A request field is wrong; the HTTP layer answers 400 with the message."""


class UpstreamContractError(RuntimeError):
    """SGLang does not look as a hook expects it."""


class OptionError(ConfigError):
    """A decoding option that is unknown, unused, mistyped or out of range.

    Attributes:
        key: the option.
        value: as it was given.
        expected: what is allowed.
    """

    def __init__(self, key: str, value: object, expected: str) -> None:
        super().__init__(f"{key}={value!r} is not allowed; expected {expected}")
        self.key, self.value, self.expected = key, value, expected
