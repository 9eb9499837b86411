"""MDS shards written by hand, from the format's description: what the reader is held against."""

import bz2
import gzip
import hashlib
import json
import struct

PACK = {"gz": gzip.compress, "bz2": bz2.compress}


def encoded(encoding, value):
    """Bytes of one value: text, JSON, bytes, int64, scalars and arrays of a dtype and shape of their own."""
    if encoding == "str":
        return value.encode()
    if encoding == "json":
        return json.dumps(value).encode()
    if encoding == "bytes":
        return value
    if encoding in ("int", "int64"):
        return struct.pack("<q", value)
    if encoding == "float32":
        return struct.pack("<f", value)
    if encoding == "str_int":
        return str(value).encode()
    if encoding == "ndarray":
        code = {"uint16": 16, "int32": 33, "float64": 66}[value.dtype.name]
        return (
            bytes([code, value.ndim << 2 | 1])
            + struct.pack(f"<{value.ndim}H", *value.shape)
            + value.tobytes()
        )
    if encoding.count(":") == 2:
        return value.tobytes()
    assert encoding.startswith("ndarray:"), encoding
    return bytes([value.ndim << 2 | 2]) + struct.pack(f"<{value.ndim}I", *value.shape) + value.tobytes()


def fixed(encoding, values):
    """How many bytes every value of a column has, None where they differ."""
    known = encoding in ("int", "int64", "float32") or encoding.count(":") == 2
    return len(encoded(encoding, values[0])) if known else None


def write(folder, columns, samples, per_shard, compression=None, hashes=("sha1",)):
    """Samples as shards of so many, with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(columns)
    encodings = [columns[name] for name in names]
    shards = []
    for number, first in enumerate(range(0, len(samples), per_shard)):
        mine = samples[first : first + per_shard]
        sizes = [fixed(columns[name], [mine[0][name]]) for name in names]
        bodies = []
        for sample in mine:
            parts = [encoded(columns[name], sample[name]) for name in names]
            head = b"".join(
                struct.pack("<I", len(part)) for part, size in zip(parts, sizes, strict=True) if size is None
            )
            bodies.append(head + b"".join(parts))
        config = json.dumps({"column_names": names, "column_encodings": encodings}).encode()
        begin = 4 + 4 * (len(mine) + 1) + len(config)
        offsets = [begin]
        for body in bodies:
            offsets.append(offsets[-1] + len(body))
        raw = struct.pack(f"<I{len(offsets)}I", len(mine), *offsets) + config + b"".join(bodies)
        name = f"shard.{number:05}.mds"
        entry = {
            "column_encodings": encodings,
            "column_names": names,
            "column_sizes": sizes,
            "compression": compression,
            "format": "mds",
            "hashes": list(hashes),
            "raw_data": _file(name, raw, hashes),
            "samples": len(mine),
            "size_limit": 1 << 26,
            "version": 2,
            "zip_data": None,
        }
        if compression:
            packed = PACK[compression](raw)
            entry["zip_data"] = _file(f"{name}.{compression}", packed, hashes)
            (folder / f"{name}.{compression}").write_bytes(packed)
        else:
            (folder / name).write_bytes(raw)
        shards.append(entry)
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))


def _file(name, data, hashes):
    return {
        "basename": name,
        "bytes": len(data),
        "hashes": {each: hashlib.new(each, data).hexdigest() for each in hashes},
    }
