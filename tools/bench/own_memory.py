"""What a process holds in memory of its own, and the model of which it is measured.

Import it before torch: it sets what is read when torch starts.
"""

import os

# Freed tensors go back to the system at once, so that memory says what is held.
os.environ |= {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}

import re
import threading
import time
from pathlib import Path

from transformers import LlamaConfig

MIB = 2**20


def own_memory() -> float:
    """MiB that this process holds and no file backs."""
    status = Path("/proc/self/status").read_text("utf-8")
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return int(found.group(1)) / 1024


class Peak:
    """The most memory held within a block, looked at every two milliseconds."""

    def __enter__(self) -> "Peak":
        self.most, self.running = own_memory(), True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.most = max(self.most, own_memory())
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()


def llama(width: int, layers: int, vocabulary: int) -> LlamaConfig:
    """A Llama with heads of 64 and separate embeddings."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        tie_word_embeddings=False,
    )
