"""Ways to damage, alter and forge a folder; each takes a copy of the folder and a source of randomness."""

import copy
import hashlib
import json
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saved_models import CONFIG, MANIFEST, WEIGHTS

# What a forger would do


def digest(data: dict[str, Any]) -> str:
    plain = {key: value for key, value in data.items() if key != "digest"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def split_weights(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join_weights(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write(folder: Path, data: dict[str, Any], *, level: str) -> None:
    """Write a changed manifest: "stale" as it is, "digest" with its digest, "files" with those of the files too."""
    if level == "forged":
        header, contents = split_weights(folder / WEIGHTS)
        files = {name: entry for name, entry in data["files"].items() if name != WEIGHTS}
        sealed = {key: data.get(key) for key in ("modules", "tensors", "ties", "buffers")} | {"files": files}
        header["__metadata__"] = {"vanishing": digest(sealed)}
        join_weights(folder / WEIGHTS, header, contents)
    if level in ("files", "forged"):
        for name in data["files"]:
            if "/" not in name and (folder / name).is_file():
                raw = (folder / name).read_bytes()
                data["files"][name] = {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
    if level != "stale":
        data["digest"] = digest(data)
    (folder / MANIFEST).write_text(json.dumps(data))


def manifest(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return data


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in nested JSON with every key or index in it."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from places(value[key])


ODD: list[Any] = [
    None, True, False, -1, 0, 1, 2, 7, 8, 9, 31, 33, 10**12, 2**62, 2**63, 10**30, 1.5, float("inf"), "", "..",
    "../../etc/passwd", "/etc/passwd", "float16", "float64", "dense", "sparse", "packed", "factored", "replaced",
    "weight", "other_block", "layers.1", "embedding.weight", [], {}, [10**12, 10**12], [-1], [[[[]]]],
    {"kind": "binary"},
]  # fmt: skip


def change_anything(data: dict[str, Any], dice: random.Random, *, but: tuple[str, ...] = ("digest",)) -> None:
    """Change, drop, rename, add or exchange something somewhere."""
    spots = [(container, key) for container, key in places(data) if not (container is data and key in but)]
    container, key = dice.choice(spots)
    what = dice.choice(["change", "change", "nudge", "drop", "rename", "exchange", "add"])
    if what == "nudge" and isinstance(container[key], int):
        container[key] += dice.choice([-1, 1, 8, 64])
    elif what == "drop":
        del container[key]
    elif what == "rename" and isinstance(container, dict):
        container[dice.choice(["../x", "a/b", "", str(key) + "x", "layers.1.weight"])] = container.pop(key)
    elif what == "exchange" and len(container) > 1:
        other = dice.choice(
            [k for k in (container if isinstance(container, dict) else range(len(container))) if k != key]
        )
        container[key], container[other] = container[other], container[key]
    elif what == "add":
        if isinstance(container, dict):
            container[dice.choice(["extra", "../x", "layers.9", "kept", "rank"])] = copy.deepcopy(container[key])
        else:
            container.append(dice.choice(ODD))
    else:
        container[key] = copy.deepcopy(dice.choice(ODD))


# Damages


def truncate(folder: Path, dice: random.Random) -> None:
    file = dice.choice(sorted(folder.iterdir()))
    size = file.stat().st_size
    os.truncate(file, dice.choice([0, 1, 7, 8, 9, size - 1, dice.randrange(size)]))


def flip_bits(folder: Path, dice: random.Random) -> None:
    file = dice.choice(sorted(folder.iterdir()))
    flip(file, dice)


def flip(file: Path, dice: random.Random, start: int = 0) -> None:
    raw = bytearray(file.read_bytes())
    for bit in dice.sample(range(8 * start, 8 * len(raw)), dice.choice([1, 1, 2, 8])):
        raw[bit // 8] ^= 1 << bit % 8
    file.write_bytes(raw)


def insert_or_cut_bytes(folder: Path, dice: random.Random) -> None:
    file = dice.choice(sorted(folder.iterdir()))
    raw = file.read_bytes()
    at = dice.randrange(len(raw))
    file.write_bytes(
        raw[:at] + (dice.randbytes(8) if dice.random() < 0.5 else b"") + raw[at + dice.choice([0, 1, 8]) :] + b"\n"
    )


def lose_a_file(folder: Path, dice: random.Random) -> None:
    file = dice.choice(sorted(folder.iterdir()))
    file.unlink()
    replacement = dice.choice(["nothing", "folder", "loop", "dangling"])
    if replacement == "folder":
        file.mkdir()
    elif replacement != "nothing":
        file.symlink_to(file.name if replacement == "loop" else "absent")


def change_json(folder: Path, dice: random.Random) -> None:
    data = manifest(folder)
    change_anything(data, dice)
    write(folder, data, level="stale")


def change_json_with_its_digest(folder: Path, dice: random.Random) -> None:
    data = manifest(folder)
    change_anything(data, dice)
    write(folder, data, level="digest")


def flip_weights_under_fresh_digests(folder: Path, dice: random.Random) -> None:
    (length,) = struct.unpack("<Q", (folder / WEIGHTS).read_bytes()[:8])
    flip(folder / WEIGHTS, dice, start=dice.choice([0, 8, 8 + length]))
    write(folder, manifest(folder), level="files")


def change_header_under_fresh_digests(folder: Path, dice: random.Random) -> None:
    header, contents = split_weights(folder / WEIGHTS)
    change_anything(header, dice, but=())
    join_weights(folder / WEIGHTS, header, contents)
    write(folder, manifest(folder), level="files")


def exchange_entries(folder: Path, dice: random.Random) -> None:
    data = manifest(folder)
    shapes = [
        ["layers.1.weight", "layers.2.weight", "layers.3.weight", "layers.4.weight"],
        ["norm.weight", "norm.bias"],
    ]
    one, other = dice.sample(dice.choice(shapes), 2)
    table = data["tensors"]
    table[one], table[other] = table[other], table[one]
    write(folder, data, level="digest")


def exchange_stored_tensors(folder: Path, dice: random.Random) -> None:
    header, contents = split_weights(folder / WEIGHTS)
    kinds: dict[str, list[str]] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            kinds.setdefault(f"{entry['dtype']}{entry['shape']}", []).append(name)
    one, other = dice.sample(dice.choice([names for names in kinds.values() if len(names) > 1]), 2)
    header[one], header[other] = header[other], header[one]
    join_weights(folder / WEIGHTS, header, contents)
    write(folder, manifest(folder), level="files")


def ask_for_another_structure(folder: Path, dice: random.Random) -> None:
    data = manifest(folder)
    modules = data["modules"]
    change = dice.choice(["drop", "factory", "rank", "tie", "type", "buffer"])
    if change == "drop":
        del modules[dice.choice(list(modules))]
    elif change == "factory":
        modules["layers.5"]["compressor"]["factory"] = "other_block"
    elif change == "rank":
        modules["layers.0"]["rank"] = dice.choice([1, 3, 32, 10**6, 10**12])
    elif change == "tie":
        data["ties"]["head.weight"] = "layers.1.weight"
    elif change == "type":
        data["tensors"]["layers.4.weight"]["dtype"] = "float16"
    else:
        data["buffers"]["places"] = "float16"
    write(folder, data, level="digest")


def name_files_elsewhere(folder: Path, dice: random.Random) -> None:
    data = manifest(folder)
    (folder.parent / "elsewhere").write_text("secret")
    name = dice.choice(
        ["../elsewhere", "..", ".", "/etc/passwd", "a/b", "..\\x", "", "x\0y", ".hidden", "~", "C:x", MANIFEST]
    )
    if dice.random() < 0.5:
        data["files"][name] = data["files"].pop(WEIGHTS)
    else:
        data["files"][name] = {"sha256": hashlib.sha256(b"secret").hexdigest(), "bytes": 6}
    write(folder, data, level="digest")


def claim_huge_shapes(folder: Path, dice: random.Random) -> None:
    data = manifest(folder)
    huge = dice.choice([[10**12], [10**6, 10**6], [2**61, 2], [2**31, 2**31], [10**12, 0], [1] * 500])
    name = dice.choice([n for n, e in data["tensors"].items() if len(e["shape"]) == 2])
    entry = data["tensors"][name]
    entry["shape"] = huge
    if "view" in entry:
        entry["view"], entry["order"] = huge, list(range(len(huge)))
    if "kept" in entry and dice.random() < 0.5:
        entry["kept"] = huge[0]
    if dice.random() < 0.5:
        header, contents = split_weights(folder / WEIGHTS)
        part = dice.choice([key for key in header if key.startswith(name)])
        header[part]["shape"] = huge
        join_weights(folder / WEIGHTS, header, contents)
    write(folder, data, level=dice.choice(["digest", "files", "forged"]))


def write_nonsense(folder: Path, dice: random.Random) -> None:
    texts = [
        b"", b"{}", b"[]", b"null", b"1", b'"vanishing"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 5_000, b"9" * 10_000,
        b'{"format": "vanishing"}', b'{"format": "vanishing", "format_version": 1}', b'{"format": "\\ud800"}',
        b'{"format": "vanishing", "format_version": 99}', b'{"format": "vanishing", "format_version": "1"}',
        b'{"format": "vanishing", "x": NaN}', b'{"format": "vanishing", "x": ' + b"[" * 900 + b"]" * 900 + b"}",
        b" " * (33 * 2**20),
    ]  # fmt: skip
    (folder / MANIFEST).write_bytes(dice.choice(texts))


def put_a_pipe(folder: Path, dice: random.Random) -> None:
    file = dice.choice(sorted(folder.iterdir()))
    file.unlink()
    os.mkfifo(file)


def change_config(folder: Path, dice: random.Random, level: str) -> None:
    config = json.loads((folder / CONFIG).read_text())
    for _ in range(dice.choice([1, 1, 3])):
        change_anything(config, dice, but=())
    (folder / CONFIG).write_text(json.dumps(config))
    data = manifest(folder)
    if level == "forged":
        # The seal holds the digests of the other files, so they come first.
        write(folder, data, level="files")
        data = manifest(folder)
    write(folder, data, level=level)
