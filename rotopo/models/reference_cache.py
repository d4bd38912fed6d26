"""Reference log-probs on disk: computed once, found by content, for all who have the folder."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rotopo.errors import InputError
from rotopo.files import sha256, write_whole, writing_whole

# Files of earlier versions have shorter names, which say nothing of what is in them.
_NAMED_BY_HASH = "[0-9a-f]" * 64 + ".arrow"


class ReferenceCache:
    """Log-probs per token of responses under one reference model, by the tokens' hash.

    The folder says which model they are of, and holds any number of Arrow files, each whole: a
    process writes a file of its own under another name first. So several processes may share the
    folder, a run that dies loses what it had not flushed, and the folder can be copied elsewhere.
    A file's name is the hash of its bytes, which is looked at whenever it is opened.

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
            try:
                found = json.loads(label.read_text("utf-8"))
            except ValueError as error:
                raise InputError(
                    f"{label} is damaged and no longer says of which model the log-probs here are: "
                    f"delete the folder, and they are computed again. ({error})"
                ) from error
            if found != self.model:
                raise InputError(
                    f"{folder} holds reference log-probs of another model ({found}, here "
                    f"{self.model}): name another folder."
                )
        else:
            write_whole(label, json.dumps(self.model))
        self.refresh()

    def __contains__(self, key: bytes) -> bool:
        return key in self._places or key in self._new

    def refresh(self) -> None:
        """Read the files that other processes have written since."""
        for file in sorted(self.folder.glob(_NAMED_BY_HASH)):
            if file in self._read:
                continue
            try:
                if sha256(file) != file.stem:
                    raise ValueError("its bytes are not those that were written")
                table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
                values = table.column("log_probs")
                keys = table.column("key").to_pylist()
            except (ValueError, OSError, KeyError) as error:
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
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table.combine_chunks())
        content = sink.getvalue()
        name = hashlib.sha256(content).hexdigest()
        with writing_whole(self.folder / f"{name}.arrow") as stream:
            stream.write(content)
        self._new.clear()
        self.refresh()
