"""Responses, OpenAI's second wire API, whose answers are a list of items.

Streams in are in ``responses_decoder``, streams out in ``responses_encoder``, requests in ``responses_request`` and
``responses_translate``, and what a client goes on from in ``responses_chain``.
"""

from __future__ import annotations

from typing import ClassVar, Final

import msgspec

from routerd.canonical import Failure, Head
from routerd.dialects import Chaining, Stamp
from routerd.dialects.faults import told_error
from routerd.dialects.responses_chain import ResponsesChaining
from routerd.dialects.responses_decoder import ResponsesDecoder, read_body
from routerd.dialects.responses_encoder import ResponsesEncoder, write_body
from routerd.dialects.responses_request import continue_request, patch_request, read_head, tool_schemas
from routerd.dialects.responses_translate import decode_request, encode_request, unsaid

_encode: Final = msgspec.json.Encoder().encode


class ResponsesDialect:
    """``POST /v1/responses``."""

    name = "responses"
    paths: tuple[str, ...] = ("/v1/responses",)
    count_paths: tuple[str, ...] = tuple(f"{path}/input_tokens" for path in paths)
    upstream_path = "/responses"
    upstream_headers: ClassVar[dict[str, str]] = {}
    forwarded_headers: tuple[str, ...] = ()
    key_header = ""
    continuations: frozenset[str] = frozenset()  # nobody documents a way to go on with an assistant's turn
    follows = True
    chaining: Chaining | None = ResponsesChaining()

    read_head = staticmethod(read_head)
    patch_request = staticmethod(patch_request)
    decode_request = staticmethod(decode_request)
    encode_request = staticmethod(encode_request)
    unsaid = staticmethod(unsaid)
    tool_schemas = staticmethod(tool_schemas)
    continue_request = staticmethod(continue_request)
    decode_body = staticmethod(read_body)
    encode_body = staticmethod(write_body)

    def decoder(self) -> ResponsesDecoder:
        return ResponsesDecoder()

    def encoder(self, stamp: Stamp) -> ResponsesEncoder:
        return ResponsesEncoder(stamp)

    def encode_count(self, head: Head) -> bytes:
        return _encode({"object": "response.input_tokens", "input_tokens": head.prompt_tokens})

    def encode_error(self, failure: Failure) -> bytes:
        return _encode({"error": told_error(failure)})


DIALECT: Final = ResponsesDialect()
