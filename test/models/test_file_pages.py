"""Loading gives the pages of a checkpoint's file back, and no other page."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sglang_dllm.models.file_pages import FilePages

MIB = 2**20


def file_memory() -> int:
    """Bytes of files that are resident in this process."""
    text = Path("/proc/self/status").read_text()
    found = re.search(r"RssFile:\s+(\d+) kB", text)
    assert found
    return 1024 * int(found[1])


def test_a_loaded_file_leaves_memory_and_can_be_read_again(tmp_path: Path) -> None:
    wanted = {f"t{i}": torch.arange(8 * MIB).mul(i).to(torch.int32) for i in range(3)}
    save_file(wanted, tmp_path / "model.safetensors")
    tensors = load_file(tmp_path / "model.safetensors")
    before = file_memory()
    total = sum(int(t.sum()) for t in tensors.values())  # reads the whole file
    assert file_memory() - before > 90 * MIB
    pages = FilePages()
    for tensor in tensors.values():
        pages.release(tensor)
    assert file_memory() - before < 5 * MIB
    assert sum(int(t.sum()) for t in tensors.values()) == total
    for name, tensor in tensors.items():
        assert torch.equal(tensor, wanted[name])


def test_a_tensor_of_no_file_keeps_its_values() -> None:
    """An update of the weights sends such tensors. Their pages have no other copy."""
    tensor = torch.arange(4 * MIB)
    FilePages().release(tensor)
    FilePages().release(tensor.view(2, -1).t())
    FilePages().release(torch.ones(3))
    assert torch.equal(tensor, torch.arange(4 * MIB))
