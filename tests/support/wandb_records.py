"""Records that W&B wrote offline."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record


def records(path: Path) -> Iterator[Record]:
    """The records of an offline file of W&B. A truncated record is left out.

    After 7 bytes the file is LevelDB's log, in blocks of 32 KiB. A block holds crc32 (4 bytes), size (2), kind (1:
    whole, 2: first, 3: middle, 4: last part), and a part of a record.
    """
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, parts = 7, b""
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4) and at <= len(data):
            yield Record.FromString(parts)
            parts = b""


def pairs(items: Any) -> dict[str, Any]:
    """The keys and values of a history or summary record. A nested key is written with dots."""
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def recorded(run_dir: Path) -> tuple[list[str], list[dict[str, Any]], dict[str, Any], Path]:
    """The ids, the history and the summary of all offline records of a run, and the folder of the newest one."""
    ids, history, summary = [], [], {}
    files = _files(run_dir)
    for record in (record for path in files for record in records(path)):
        if record.HasField("run"):
            ids.append(record.run.run_id)
        if record.HasField("history"):
            history.append(pairs(record.history.item))
        if record.HasField("summary"):
            summary.update(pairs(record.summary.update))
    return ids, history, summary, files[-1].parent


def keys_of(run_dir: Path) -> set[str]:
    """The keys of all history and summary records of a run, without W&B's own, which begin with _.

    W&B keeps the data of a chart KEY as KEY_table.
    """
    both = [(one.history.item, one.summary.update) for path in _files(run_dir) for one in records(path)]
    items = [item for history, summary in both for item in (*history, *summary)]
    keys = {item.key or item.nested_key[0] for item in items}
    return {key.removesuffix("_table") for key in keys if not key.startswith("_")}


def _files(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
