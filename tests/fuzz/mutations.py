"""Mutations of a checkpoint's files and of its index."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

INDEX = "index.json"
HUGE = "9" * 40
# Values that take another's place.
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 7, 2**31, 2**40, 2**62, 2**63, 2**64, -(2**63), 10**400),
    *(0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"), float("-inf")),
    *("", "x", "5", "1e3", "NaN", "..", "/", "../x", "/etc/passwd", "a\x00b", "a\nb", "\x1b[31m", "\ud800", "é\u202e"),
    "x" * 3000,
    *([], {}, [[]], [None], [0], [-1], [2**62] * 3, ["x"], {"x": 1}, {"": {}}, [[[[0]]]]),
]  # fmt: skip
FILES = ["../0", "/etc/passwd", "a/b", "a\x00", "", ".", "..", "index.json", "0" * 16 + "-00000.safetensors"]
_DEEP = "a very deep place"


def digest(index: dict[str, Any]) -> str:
    """Compute it by the format's definition, without the tested code."""
    return hashlib.sha256(json.dumps(index, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def seal(folder: Path) -> bool:
    """Let the index's checksums fit what is there, as another writer would. Whether that could be done."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text())
        for name, facts in index["files"].items() if isinstance(index.get("files"), dict) else ():
            file = folder / name
            if isinstance(facts, dict) and "/" not in name and "\0" not in name and file.is_file():
                content = file.read_bytes()
                if facts.get("sha256") != hashlib.sha256(content).hexdigest():
                    facts |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        return reseal_index(path, index)
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def reseal_index(path: Path, index: dict[str, Any]) -> bool:
    index.pop("sha256", None)
    path.write_text(json.dumps({**index, "sha256": digest(index)}))
    return True


# ---------------------------------------------------------------------------------------------- bytes


def flip(content: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def truncate(content: bytearray, rng: random.Random) -> None:
    del content[rng.choice([rng.randrange(len(content) + 1), 8, len(content) - 1]) :]


def append(content: bytearray, rng: random.Random) -> None:
    content += rng.randbytes(rng.choice([1, 8, 4096])) if rng.random() < 0.7 else b" " * 5


def zero(content: bytearray, rng: random.Random) -> None:
    start, length = rng.randrange(len(content) + 1), rng.choice([1, 8, 512, 4096])
    content[start : start + length] = bytes(len(content[start : start + length]))


def swap(content: bytearray, rng: random.Random) -> None:
    length = rng.choice([1, 8, 64, 512])
    a, b = (rng.randrange(max(1, len(content) - length)) for _ in range(2))
    content[a : a + length], content[b : b + length] = content[b : b + length], content[a : a + length]


def duplicate(content: bytearray, rng: random.Random) -> None:
    start, length = rng.randrange(len(content) + 1), rng.choice([1, 8, 64, 512])
    content[start:start] = content[start : start + length]


def other_token(content: bytearray, rng: random.Random) -> None:
    """One number or word of a text for another."""
    start = rng.randrange(len(content) + 1)
    place = content.find(rng.choice([b"0", b"1", b'"', b",", b"{", b"[", b":"]), start)
    content[place : place + 1] = rng.choice(
        [b"-1", b"1e9", b"[", b"]", b'""', b"null", b"\xff", b"9" * 50, b",,", b"0.5"]
    )


BYTES: list[Callable[[bytearray, random.Random], None]] = [
    flip, flip, truncate, append, zero, swap, duplicate, other_token
]  # fmt: skip


def change_bytes(folder: Path, rng: random.Random, _: Path) -> str:
    path = rng.choice(sorted(folder.iterdir()))
    content = bytearray(path.read_bytes())
    how = rng.choice(BYTES)
    how(content, rng)
    path.write_bytes(content)
    return f"{how.__name__} in {path.name[16:] or path.name}"


# ---------------------------------------------------------------------------------------------- files


OF_FILES = [
    *("remove", "rename", "directory", "link outside", "link inside", "link to a device", "pipe", "empty"),
    *("permissions", "hard link", "other save's", "swap", "beside", "folder is a file", "folder is a link"),
    *("folder is empty", "no folder", "other save's index", "partial"),
]


def change_files(folder: Path, rng: random.Random, other: Path) -> str:
    path = rng.choice(sorted(folder.iterdir()))
    outside = folder.with_name(f"{folder.name}-outside")
    how = rng.choice(OF_FILES)
    content = path.read_bytes()
    if how in ("remove", "directory", "link outside", "link inside", "link to a device", "pipe", "hard link"):
        path.unlink()
    if how == "rename":
        path.rename(
            path.with_name(rng.choice(["x", path.name.upper(), path.name + ".partial", "f" * 16 + path.name[16:]]))
        )
    elif how == "directory":
        path.mkdir()
    elif how in ("link outside", "hard link"):
        outside.write_bytes(content)
        (os.link if how == "hard link" else os.symlink)(outside, path)
    elif how == "link inside":
        path.with_name("inside").write_bytes(content)
        path.symlink_to("inside")
    elif how == "link to a device":
        path.symlink_to(rng.choice(["/dev/zero", "/dev/stdin", "/proc/self/mem", "/etc/passwd", "nowhere", path.name]))
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "permissions":
        path.chmod(0)
    elif how == "other save's":
        path.write_bytes(rng.choice(sorted(other.iterdir())).read_bytes())
    elif how == "swap":
        second = rng.choice(sorted(folder.iterdir()))
        path.write_bytes(second.read_bytes())
        second.write_bytes(content)
    elif how == "beside":
        path.with_name(rng.choice([".metadata", "x.pkl", "optimizer.bin", "__0_0.distcp", "é"])).write_bytes(
            b"cos\nsystem\n."
        )
    elif how == "folder is a file":
        _clear(folder)
        folder.rmdir()
        folder.write_bytes(content)
    elif how == "folder is a link":
        folder.rename(outside)
        folder.symlink_to(outside)
    elif how in ("folder is empty", "no folder"):
        _clear(folder)
        if how == "no folder":
            folder.rmdir()
    elif how == "other save's index":
        (folder / INDEX).write_bytes((other / INDEX).read_bytes())
    elif how == "partial":
        (folder / INDEX).rename(folder / f"{INDEX}.partial")
    return f"{how}: {path.name[16:] or path.name}"


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


# ---------------------------------------------------------------------------------------------- the index

Tree = Any


def change_index(folder: Path, rng: random.Random, other: Path) -> str:
    """Change what the index says, once or twice."""
    path = folder / INDEX
    index = json.loads(path.read_text())
    how = []
    for _ in range(rng.choice([1, 1, 1, 2])):
        way = rng.choice([anywhere, anywhere, anywhere, of_a_tensor, of_a_tensor, of_what_is_said])
        how.append(way(index, rng))
    text = json.dumps(index)
    if _DEEP in text:
        depth = rng.choice([50, 300, 900, 940, 960, 980, 990, 2000, 200_000])
        left, right = rng.choice(["[]", ('{"a":', "}")])
        text = text.replace(json.dumps(_DEEP), f"{left * depth}1{right * depth}", 1)
        how[-1] += f" x {depth}"
    if rng.random() < 0.03:
        text = text.replace("{", '{"save": 1, "tensors": {}, ', 1)
        how.append("keys twice")
    path.write_text(text)
    return "; ".join(how)


def places(tree: Tree, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all values."""
    found = [here] if here else []
    for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        found += places(tree[key], (*here, key))
    return found


def anywhere(index: Tree, rng: random.Random) -> str:
    every = places(index)
    if rng.random() < 0.5:  # most are of the tensors
        every = [way for way in every if way[0] != "tensors"]
    if rng.random() < 0.3:
        every = [way for way in every if len(way) <= 2]
    way = rng.choice(every)
    parent = index
    for key in way[:-1]:
        parent = parent[key]
    last, value = way[-1], parent[way[-1]]
    how = rng.choice(["replace", "replace", "replace", "nudge", "cast", "remove", "add", "rename", "copy", "nest"])
    if how == "nudge":
        if type(value) in (int, float):
            parent[last] = rng.choice([value + 1, value - 1, -value, value * 2, value * 10**6, value / 3, value + 0.5])
        else:
            parent[last] = [value]
    elif how == "cast":
        ways: list[Callable[[Any], Any]] = [str, bool, lambda v: [v], lambda v: {"x": v}, lambda v: f" {v}"]
        parent[last] = rng.choice(ways)(value)
        if type(value) is int and rng.random() < 0.5:
            parent[last] = float(value)
    elif how == "remove":
        parent.pop(last)
    elif how == "add":
        new = rng.choice(VALUES)
        if isinstance(parent, list):
            parent.insert(rng.randrange(len(parent) + 1), new)
        else:
            parent[rng.choice(["", "x", "\ud800", "sha256", "a\nb", "x" * 3000])] = new
    elif how == "rename" and isinstance(parent, dict):
        parent[rng.choice(["x", f"{last}x", "", f"exp_avg.{last}", f"model.{last}", "../x", "\ud800"])] = parent.pop(
            last
        )
    elif how == "copy":
        source = rng.choice(every)
        found = index
        for key in source:
            found = (
                found[key] if isinstance(found, (dict, list)) and (isinstance(found, list) or key in found) else None
            )
        parent[last] = copy.deepcopy(found)
    elif how == "nest":
        parent[last] = _DEEP
    else:
        parent[last] = copy.deepcopy(rng.choice(VALUES))
    shown = (
        f" by {str(parent[last])[:60]!r}" if how != "remove" and (isinstance(parent, list) or last in parent) else ""
    )
    return f"{how} {'/'.join(map(str, way))}{shown}"[:200]


OF_TENSORS = [
    *("dtype", "shape", "flat", "empty", "overflow", "beyond", "overlap", "order", "shift", "other file", "same bytes"),
    *("other's", "split", "no chunks", "remove", "twice", "transposed", "file name", "again under a name"),
]


def of_a_tensor(index: Tree, rng: random.Random) -> str:
    """Return nearly valid values: shapes, chunks, offsets, types."""
    if not isinstance(index.get("tensors"), dict) or not index["tensors"]:
        return anywhere(index, rng)
    key = rng.choice(sorted(index["tensors"]))
    facts = index["tensors"][key]
    try:
        chunk = rng.choice(facts["chunks"])
        how = rng.choice(OF_TENSORS)
        if how == "dtype":
            facts["dtype"] = rng.choice(
                ["float64", "float32", "bfloat16", "int64", "int32", "uint8", "bool", "complex64"]
            )
        elif how == "shape":
            facts["shape"] = [n + rng.choice([0, 1, -1]) for n in facts["shape"]]
        elif how == "flat":
            facts["shape"] = [*facts["shape"], 1]
            for each in facts["chunks"]:
                each[0], each[1] = [*each[0], 0], [*each[1], 1]
        elif how == "empty":
            shape = rng.choice([[0], [0, 2**61], [2**40, 0, 2**40], [2**62 - 1] * 5 + [0]])
            facts |= {"shape": shape, "chunks": rng.choice([[], [[[0] * len(shape), shape, chunk[2], chunk[3]]]])}
        elif how == "overflow":
            shape = rng.choice([[2**32, 2**32], [2**61, 8], [2**31] * 3, [2**61]])
            facts |= {"shape": shape, "chunks": [[[0] * len(shape), shape, chunk[2], chunk[3]]]}
        elif how == "beyond":
            chunk[3] += rng.choice([1, 4, 10**6, 2**61])
        elif how == "overlap":
            facts["chunks"].append(copy.deepcopy(chunk))
        elif how == "order":
            rng.shuffle(facts["chunks"])
        elif how == "shift":
            chunk[0] = [n + rng.choice([0, 1, -1]) for n in chunk[0]]
        elif how == "other file":
            chunk[2] = rng.choice([*index["files"], *FILES])
        elif how == "same bytes":
            chunk[3] = rng.choice([0, 4, 8, chunk[3] + 4, chunk[3] - 4])
        elif how == "other's":
            facts["chunks"] = copy.deepcopy(rng.choice(sorted(index["tensors"].values(), key=str))["chunks"])
        elif how == "split":
            chunk[1] = [max(0, n - 1) for n in chunk[1]]
        elif how == "no chunks":
            facts["chunks"] = []
        elif how == "remove":
            del index["tensors"][key]
        elif how == "twice":
            index["tensors"][f"exp_avg.{key.partition('.')[2]}"] = copy.deepcopy(facts)
        elif how == "transposed":
            facts["shape"] = facts["shape"][::-1]
            for each in facts["chunks"]:
                each[0], each[1] = each[0][::-1], each[1][::-1]
        elif how == "file name":
            old, new = rng.choice(sorted(index["files"])), rng.choice(FILES)
            index["files"][new] = index["files"].pop(old)
            for one in index["tensors"].values():
                for each in one["chunks"]:
                    each[2] = new if each[2] == old else each[2]
        elif how == "again under a name":
            kind = rng.choice(["master", "max_exp_avg_sq", "step", "x", "model", "rng"])
            index["tensors"][f"{kind}.{key.partition('.')[2]}"] = copy.deepcopy(facts)
    except (KeyError, TypeError, IndexError, AttributeError):  # the first change has left nothing of the kind
        return anywhere(index, rng)
    return f"{how} of {key}"


def of_what_is_said(index: Tree, rng: random.Random) -> str:
    """Numbers of the schedule, of the steps and of the groups."""
    about = index.get("about")
    if not isinstance(about, dict):
        return anywhere(index, rng)
    name = rng.choice(["schedule", "scalars", "groups", "world_size", "engine", "optimizer", "scheduler", "extra"])
    every = places(about.get(name), (name,))
    way = rng.choice(every or [(name,)])
    parent = about
    for key in way[:-1]:
        parent = parent[key]
    parent[way[-1]] = copy.deepcopy(rng.choice(VALUES))
    return f"about/{'/'.join(map(str, way))} = {str(parent[way[-1]])[:60]!r}"
