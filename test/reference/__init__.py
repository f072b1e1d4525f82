"""The independent oracle: published decoding loops over transformers' own models.

Nothing here may import sglang or sglang_dllm: a shared line is a shared bug.
"""
