"""The torch-CPU platform for machines without an accelerator."""
