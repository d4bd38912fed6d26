"""Reference log-probs on disk: computed once, found by content, for all who have the folder."""

import json
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rotopo.errors import InputError


class ReferenceCache:
    """Log-probs per token of responses under one reference model, by the tokens' hash.

    The folder says which model they are of, and holds any number of Arrow files, each whole: a
    process writes a file of its own under another name first. So several processes may share the
    folder, a run that dies loses what it had not flushed, and the folder can be copied elsewhere.

    Args:
        folder: where the files are; made if there is none.
        reference: fingerprint of the reference, see :class:`~rotopo.models.policy.Policy`.
        dtype: of the log-probs, float32 or float64.

    Raises:
        InputError: the folder belongs to another model, or a file in it cannot be read.
    """

    def __init__(self, folder: Path, reference: str, dtype: torch.dtype) -> None:
        self.folder = folder
        self.model = {"reference": reference}
        self.dtype = dtype
        self._places: dict[bytes, tuple[pa.ChunkedArray, int]] = {}
        self._new: dict[bytes, np.ndarray] = {}
        self._read: set[Path] = set()
        folder.mkdir(parents=True, exist_ok=True)
        label = folder / "model.json"
        if label.exists():
            found = json.loads(label.read_text("utf-8"))
            if found != self.model:
                raise InputError(
                    f"{folder} holds reference log-probs of another model ({found}, here "
                    f"{self.model}): name another folder."
                )
        else:
            unfinished = label.with_suffix(f".{uuid.uuid4().hex}")
            unfinished.write_text(json.dumps(self.model), "utf-8")
            unfinished.replace(label)
        self.refresh()

    def __contains__(self, key: bytes) -> bool:
        return key in self._places or key in self._new

    def refresh(self) -> None:
        """Read the files that other processes have written since."""
        for file in sorted(self.folder.glob("*.arrow")):
            if file in self._read:
                continue
            try:
                table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
                values = table.column("log_probs")
                keys = table.column("key").to_pylist()
            except (pa.ArrowInvalid, OSError, KeyError) as error:
                raise InputError(
                    f"{file}: not a whole file of reference log-probs; delete it, and they are "
                    f"computed again. ({error})"
                ) from error
            self._places.update((key, (values, row)) for row, key in enumerate(keys))
            self._read.add(file)

    def get(self, keys: Sequence[bytes]) -> Tensor | None:
        """The log-probs of all responses in a row [N], or None where one of them is missing."""
        found = []
        for key in keys:
            if key in self._places:
                values, row = self._places[key]
                found.append(values[row].values.to_numpy())
            elif key in self._new:
                found.append(self._new[key])
            else:
                return None
        return torch.from_numpy(np.concatenate(found))

    def add(self, keys: Sequence[bytes], lengths: Sequence[int], log_probs: Tensor) -> None:
        """Keep the log-probs [N] of responses of these lengths, until :meth:`flush` in memory."""
        parts = np.split(log_probs.to("cpu", self.dtype).numpy(), np.cumsum(lengths)[:-1])
        self._new.update(
            (key, part) for key, part in zip(keys, parts, strict=True) if key not in self._places
        )

    def flush(self) -> None:
        """Write what is new to a file of its own."""
        if not self._new:
            return
        value_type = pa.float64() if self.dtype == torch.float64 else pa.float32()
        table = pa.table(
            {
                "key": pa.array(list(self._new), pa.binary(16)),
                "log_probs": pa.array(list(self._new.values()), pa.list_(value_type)),
            }
        )
        file = self.folder / f"{uuid.uuid4().hex}.arrow"
        unfinished = file.with_suffix(".unfinished")
        with pa.ipc.new_file(str(unfinished), table.schema) as writer:
            writer.write_table(table.combine_chunks())
        unfinished.replace(file)
        self._new.clear()
        self.refresh()
