"""Open Inference's binary tensor extension: what stands behind the JSON of a body, and how values are packed.

A text is its length in 4 bytes, little-endian, and its bytes; numbers are little-endian too. Does not know which
tensors there are.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from app.errors import InvalidRequest, MalformedJSON
from app.tokenization import Pointer, label

HEADER_LENGTH = "inference-header-content-length"
_LENGTH = struct.Struct("<I")
_NUMBERS = {"FP32": "f", "INT64": "q", "BOOL": "?"}


def split(body: bytes, header_length: str | None) -> tuple[bytes, bytes]:
    """The JSON of a body, and the tensors behind it.

    Raises:
        MalformedJSON: the length is no length, or longer than the body.
    """
    if header_length is None:
        return body, b""
    size = int(header_length[:20]) if header_length.isdecimal() else len(body) + 1
    if size > len(body):
        message = f"Inference-Header-Content-Length should be at most the body's {len(body)} bytes."
        raise MalformedJSON(message, [{"pointer": "", "message": message}])
    return body[:size], body[size:]


def unpack_texts(raw: bytes, count: int, pointer: Pointer) -> list[str]:
    """The `count` elements of a BYTES tensor, which must be UTF-8.

    Args:
        pointer: where element `i` stands, for errors.

    Raises:
        InvalidRequest: a text is cut short or not UTF-8, or more follows the last one.
    """
    texts: list[str] = []
    at = 0
    for index in range(count):
        begin = at + _LENGTH.size
        at = begin + (_LENGTH.unpack_from(raw, at)[0] if begin <= len(raw) else 0)
        if at > len(raw):
            raise _invalid(pointer(index), "is cut short")
        try:
            texts.append(raw[begin:at].decode())
        except UnicodeDecodeError:
            raise _invalid(pointer(index), "is not UTF-8") from None
    if at < len(raw):
        raise _invalid(pointer(count - 1), f"is the last one, and {len(raw) - at} bytes follow it")
    return texts


def pack(datatype: str, values: Sequence[str] | Sequence[float]) -> bytes:
    """A tensor of `datatype`."""
    if datatype == "BYTES":
        texts = [str(value).encode() for value in values]
        return b"".join(_LENGTH.pack(len(text)) + text for text in texts)
    return struct.pack(f"<{len(values)}{_NUMBERS[datatype]}", *values)


def _invalid(pointer: str, what: str) -> InvalidRequest:
    message = f"{label(pointer)} {what}."
    return InvalidRequest(message, [{"pointer": pointer, "message": message}])
