"""SGLang on plain torch, for machines without an accelerator."""
