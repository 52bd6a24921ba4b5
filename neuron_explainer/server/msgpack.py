"""Writing MessagePack: what JSON holds, and bytes. Seed 003's clients read it."""

import struct
from typing import Any

_LONG = ((0xFF, "B"), (0xFFFF, "H"), (0xFFFFFFFF, "I"))


def packed(value: Any) -> bytes:
    """A value of None, bool, int, float, str, bytes, list, tuple and dict as MessagePack."""
    out = bytearray()
    _pack(value, out)
    return bytes(out)


def _pack(value: Any, out: bytearray) -> None:
    if value is None:
        out.append(0xC0)
    elif isinstance(value, bool):
        out.append(0xC3 if value else 0xC2)
    elif isinstance(value, int):
        _pack_int(value, out)
    elif isinstance(value, float):
        out += b"\xcb" + struct.pack(">d", value)
    elif isinstance(value, str):
        text = value.encode(errors="replace")
        _pack_head(len(text), out, 0xA0, 32, (0xD9, 0xDA, 0xDB))
        out += text
    elif isinstance(value, bytes):
        _pack_head(len(value), out, 0, 0, (0xC4, 0xC5, 0xC6))
        out += value
    elif isinstance(value, list | tuple):
        _pack_head(len(value), out, 0x90, 16, (0, 0xDC, 0xDD))
        for each in value:
            _pack(each, out)
    else:
        assert isinstance(value, dict), type(value)
        _pack_head(len(value), out, 0x80, 16, (0, 0xDE, 0xDF))
        for key, each in value.items():
            _pack(key, out)
            _pack(each, out)


def _pack_int(value: int, out: bytearray) -> None:
    if -32 <= value < 128:
        out += struct.pack(">b", value) if value < 0 else bytes([value])
    elif value < 0:
        out += b"\xd3" + struct.pack(">q", value)
    else:
        out += b"\xcf" + struct.pack(">Q", value)


def _pack_head(
    length: int, out: bytearray, short: int, most: int, codes: tuple[int, int, int]
) -> None:
    """The type and the length: in one byte below ``most``, else a code and 1, 2 or 4 bytes."""
    if length < most:
        out.append(short + length)
        return
    for code, (largest, form) in zip(codes, _LONG, strict=True):
        if code and length <= largest:
            out += bytes([code]) + struct.pack(f">{form}", length)
            return
    raise ValueError(f"{length} entries are too many for MessagePack")
