"""The contract with SGLang: hooks and what they rely on."""
