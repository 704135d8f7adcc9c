"""What is read of a server's response: a bounded body, whatever the server or its proxy claims."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import AsyncIterator
from typing import Any

import openai

from opdjax.runs.bounds import REPLY_BYTES

# httpx, or the package that took its place in newer versions of openai.
REDIRECT = "x-redirects-to"
httpx = importlib.import_module(type(openai.DEFAULT_CONNECTION_LIMITS).__module__.partition(".")[0])


async def bound(response: Any) -> None:
    """A hook of an httpx client: limits the body that will be read, also while it is decompressed.

    Reading it raises httpx.DecodingError beyond REPLY_BYTES, and for an encoding other than gzip
    and deflate, which requests name. The body then counts as UTF-8. No redirect is followed,
    which would send the key or the prompts to another server: the header REDIRECT holds it.
    """
    if "location" in response.headers:
        response.headers[REDIRECT] = response.headers.pop("location")
    encoding = response.headers.pop("content-encoding", "identity").strip().lower()
    response.headers["content-type"] = "application/json"
    response.stream = _Bounded(response.stream, encoding)


class _Bounded(httpx.AsyncByteStream):
    def __init__(self, stream: Any, encoding: str):
        self._stream, self._encoding = stream, encoding

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self._encoding not in ("identity", "gzip", "deflate"):
            raise httpx.DecodingError(f"content-encoding {self._encoding[:40]!r} was not requested")
        unpack = None if self._encoding == "identity" else zlib.decompressobj(47)
        left = REPLY_BYTES
        async for chunk in self._stream:
            try:
                chunk = chunk if unpack is None else unpack.decompress(chunk, left + 1)
            except zlib.error as error:
                raise httpx.DecodingError(f"the body is not {self._encoding}: {error}") from error
            left -= len(chunk)
            if left < 0:
                raise httpx.DecodingError(f"the response has more than {REPLY_BYTES} bytes")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()
