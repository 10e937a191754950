# SPDX-License-Identifier: BSD-3-Clause
"""One long text, as bytes."""

import sysconfig
from pathlib import Path

import torch
from torch import Tensor

_NO_TEXT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


def load(path: Path | None) -> Tensor:
    """A file, or all readable text files of a folder in the order of their paths, joined.

    None: Python's standard library, one long codebase that is on every machine.

    Returns:
        [bytes] uint8.

    Raises:
        FileNotFoundError: nothing to read there.
    """
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [f for f in root.rglob("*.py") if not _NO_TEXT & set(f.relative_to(root).parts)]
    elif path.is_dir():
        files = [f for f in path.rglob("*") if f.is_file() and ".git" not in f.parts]
    else:
        files = [path]
    texts = [data for f in sorted(files) if (data := f.read_bytes()) and b"\0" not in data]
    if not texts:
        raise FileNotFoundError(f"no text in {path}")
    return torch.frombuffer(bytearray(b"\n".join(texts)), dtype=torch.uint8)


def windows(text: Tensor, count: int, length: int, seed: int) -> Tensor:
    """`count` windows of the text at places that depend only on the seed: [count, length] int64."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - length + 1, (count,), generator=generator)
    return torch.stack([text[start : start + length].long() for start in starts.tolist()])


def unigram_bits(text: Tensor) -> float:
    """Entropy of a single byte, in bits: what a model reaches that only counts bytes."""
    share = torch.bincount(text, minlength=256) / len(text)
    return -(share * share.log2()).nan_to_num().sum().item()
