"""Damage for files of models, drawn by hypothesis: JSON with something else in it, and safetensors files."""

from __future__ import annotations

import copy
import json
import struct

from hypothesis import note
from hypothesis import strategies as st

JUNK = [None, True, False, -1, 0, 1, 3, 2**31, 2**70, 0.5, float("nan"), "", "x", "int4", "..", "\x00"]
JUNK += [[], [[1]], {}, {"a": 1}]
KINDS = ["bytes", "cut", "header", "metadata", "metadata", "metadata", "no checksums", "dtype", "data", "data"]
SAME_SIZE = {
    "U8": ["I8", "BOOL", "F8_E4M3"],
    "I8": ["U8", "BOOL"],
    "F32": ["I32", "U32"],
    "I32": ["F32", "U32"],
    "F16": ["BF16"],
}
junk = st.sampled_from(JUNK)


@st.composite
def changed_json(draw, value):
    """A JSON value with something in it taken away, replaced or added, at any depth."""
    value = copy.deepcopy(value)
    place = value
    while True:
        if not isinstance(place, (dict, list)) or not place:
            return draw(junk)
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys))
        if isinstance(place[key], (dict, list)) and place[key] and draw(st.booleans()):
            place = place[key]
            continue
        action = draw(st.sampled_from(["replace", "replace", "remove", "add", "swap"]))
        if action == "replace":
            place[key] = draw(junk)
        elif action == "remove":
            del place[key]
        elif action == "add" and isinstance(place, dict):
            place[draw(st.sampled_from(["zero_point", "rotation", "extra", "_type"]))] = draw(junk)
        elif isinstance(place, dict):
            other = draw(st.sampled_from(keys))
            place[key], place[other] = place[other], place[key]
        else:
            place.append(draw(junk))
        return value


class Content(bytes):
    """Bytes of a file whose repr is short."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


class SafetensorsFile:
    """A safetensors file in pieces: its header as JSON, and the bytes of its data."""

    def __init__(self, content: bytes):
        (size,) = struct.unpack("<Q", content[:8])
        self.header, self.data = json.loads(content[8 : 8 + size]), content[8 + size :]

    def content(self) -> bytes:
        head = json.dumps(self.header).encode()
        return struct.pack("<Q", len(head)) + head + self.data


@st.composite
def damaged(draw, content: bytes):
    """The bytes of a safetensors file with something changed: bytes, its header, a header in its metadata, or entries."""
    return Content(draw(_damaged(content)))


@st.composite
def _damaged(draw, content: bytes):
    kind = draw(st.sampled_from(KINDS))
    note(kind)
    if kind == "bytes":
        place = draw(st.integers(0, len(content) - 1))
        return content[:place] + draw(st.binary(min_size=1, max_size=8)) + content[place + draw(st.integers(0, 9)) :]
    if kind == "cut":
        return content[: draw(st.integers(0, len(content)))]
    file = SafetensorsFile(content)
    if kind == "data":
        if file.data:
            place = draw(st.integers(0, len(file.data) - 1))
            file.data = file.data[:place] + bytes([draw(st.integers(0, 255))]) + file.data[place + 1 :]
        return file.content()
    metadata = file.header.get("__metadata__", {})
    if kind == "header" or not metadata:
        file.header = draw(changed_json(file.header))
    elif kind == "dtype":
        key = draw(st.sampled_from(sorted(set(file.header) - {"__metadata__"})))
        entry = file.header[key]
        if draw(st.booleans()) and entry["dtype"] in SAME_SIZE:
            entry["dtype"] = draw(st.sampled_from(SAME_SIZE[entry["dtype"]]))
        else:
            entry["shape"] = draw(
                st.sampled_from([list(reversed(entry["shape"])), [*entry["shape"], 1], [1, *entry["shape"]]])
            )
    else:
        if kind == "no checksums":
            metadata.pop("intscale", None)
        name = draw(st.sampled_from(sorted(metadata)))
        action = draw(st.sampled_from(["inside", "inside", "inside", "text", "remove", "rename", "exchange"]))
        text = metadata.pop(name)
        if action == "inside" and text[:1] in "[{":
            metadata[name] = json.dumps(draw(changed_json(json.loads(text))))
        elif action == "text":
            place = draw(st.integers(0, len(text)))
            metadata[name] = (
                text[:place] + draw(st.sampled_from(["", "[" * 3000, "{", '"', "0", "\u2028"])) + text[place + 1 :]
            )
        elif action == "rename":
            metadata[name + draw(st.sampled_from(["x", ".", ".weight"]))] = text
        elif action == "exchange" and metadata:
            other = draw(st.sampled_from(sorted(metadata)))
            metadata[name], metadata[other] = metadata[other], text
    return file.content()


@st.composite
def changed_folder(draw, weights: bytes, config: dict):
    """The bytes of both files, one of them changed; most changes of the configuration are in what says how it is quantized."""
    if draw(st.booleans()):
        return draw(damaged(weights)), json.dumps(config).encode()
    kind = draw(st.sampled_from(["quantization", "quantization", "all", "bytes"]))
    if kind == "quantization":
        changed = {**config, "quantization_config": draw(changed_json(config["quantization_config"]))}
        return Content(weights), json.dumps(changed).encode()
    if kind == "all":
        key = draw(st.sampled_from(sorted(config)))
        small = [None, True, -1, 0, 1, 3, 0.5, "", "x", [], [1], {}, {"a": 1}]
        return Content(weights), json.dumps({**config, key: draw(st.sampled_from(small))}).encode()
    text = json.dumps(config).encode()
    place = draw(st.integers(0, len(text) - 1))
    return weights, text[:place] + draw(st.binary(max_size=3)) + text[place + 1 :]
