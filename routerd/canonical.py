"""The words every layer shares: what a request needs, what a stream says, how an attempt ended.

Rules
-----
* Nothing here does anything: frozen structs, enums and one secret type. No I/O, no clock, no vendor's name.
* A stream is a sequence of *events* shaped like typed content blocks (index, start, deltas, stop), the richest of
  the three wire dialects, so that nothing is lost on the way through.
* A *frame* is the smallest whole piece of an upstream's stream: its bytes exactly as they came, and what they mean.
* Units stand last in a name: ``_s`` seconds, ``_usd`` dollars, ``_tokens`` tokens.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
from collections.abc import Callable
from typing import Literal

import msgspec


class Outcome(enum.StrEnum):
    """The class of a finished attempt (and, for an exchange, of its last one)."""

    SUCCESS = "success"
    RATE_LIMITED = "rate_limited"
    EXHAUSTED = "exhausted"
    UNAVAILABLE = "unavailable"
    STALLED = "stalled"
    TRUNCATED = "truncated"
    IN_BAND_ERROR = "in_band_error"
    MALFORMED = "malformed"
    UNAUTHORIZED = "unauthorized"
    UNSUPPORTED = "unsupported"
    CLIENT_ERROR = "client_error"
    CANCELLED = "cancelled"


class Side(enum.StrEnum):
    """Who is at fault."""

    CLIENT = "client"
    ROUTER = "router"
    UPSTREAM = "upstream"


class Failure(msgspec.Struct, frozen=True):
    """Why an attempt, or a whole exchange, did not succeed.

    ``detail`` is always in our own words: an upstream's text never travels further than the classifier.
    ``status`` is the HTTP status seen (upstream side) or to be sent (client and router side).
    ``cause`` is the outcome that decides what the breaker and the quota learn, where an answer had begun and the
    outcome itself says too little: for an in-band error the one its code maps to.
    """

    outcome: Outcome
    side: Side
    detail: str
    status: int | None = None
    code: str = ""
    retry_after_s: float | None = None
    cause: Outcome | None = None
    account_wide: bool = False  # true for what every model of the same key shares: 401, balance, connect errors


class BadRequest(Exception):
    """The client's request cannot be understood. ``failure`` says what to do about it, in our words."""

    def __init__(self, detail: str, *, status: int = 400, code: str = "invalid_request") -> None:
        super().__init__(detail)
        self.failure = Failure(Outcome.CLIENT_ERROR, Side.CLIENT, detail, status=status, code=code)


class UpstreamProtocolError(Exception):
    """The upstream sent bytes that are not its dialect (HTML, other JSON, a broken line). Raised only by decoders."""


class UpstreamTruncated(UpstreamProtocolError):
    """The upstream ended its stream without the dialect's terminal marker, or inside a frame."""


class Secret:
    """A key. Printing it, in any way, prints ``***``; only ``reveal()`` gives the text."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        return self._text

    def matches(self, text: str) -> bool:
        """Compare in constant time."""
        return hmac.compare_digest(self._text.encode(), text.encode())

    def __repr__(self) -> str:
        return "***"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self.matches(other._text)

    def __hash__(self) -> int:
        return hash(self._text)

    def __bool__(self) -> bool:
        return bool(self._text)


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one answer. ``cached_tokens`` is a part of ``input_tokens``, ``reasoning_tokens`` of ``output_tokens``.

    ``cost_usd`` is what the upstream itself says it billed; believed only after a unit and magnitude check.
    """

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    cost_usd: float | None = None


# --- events ---------------------------------------------------------------------------------------------------------


class Start(msgspec.Struct, frozen=True, gc=False):
    """The answer has begun."""

    id: str
    model: str


class TextDelta(msgspec.Struct, frozen=True, gc=False):
    index: int
    text: str


class ReasoningDelta(msgspec.Struct, frozen=True, gc=False):
    """A piece of thinking. ``signature`` is the vendor's seal on the block, sent once, at the end, often alone.

    ``sealed``: a whole block that only its vendor can read, in place of text.
    """

    index: int
    text: str
    signature: str = ""
    sealed: str = ""


class ToolStart(msgspec.Struct, frozen=True, gc=False):
    """A tool call opens. ``index`` is its place among the tool calls of the answer.

    ``signature``: JSON that the vendor sealed the call with and wants back with it.
    """

    index: int
    id: str
    name: str
    signature: str = ""


class ToolDelta(msgspec.Struct, frozen=True, gc=False):
    """A piece of a call's arguments, as JSON text."""

    index: int
    arguments: str


class UsageReport(msgspec.Struct, frozen=True, gc=False):
    """Usage so far; the last report of a stream stands."""

    usage: Usage


FinishReason = Literal["stop", "length", "tool_calls", "content_filter", "error"]


class Finish(msgspec.Struct, frozen=True, gc=False):
    """The model says why it ended. Not yet the end of the stream: usage and the terminal marker may follow.

    ``details``: all the thinking of the answer as JSON, sealed by the vendor, where the dialect has such a thing.
    """

    reason: FinishReason
    details: str = ""


class End(msgspec.Struct, frozen=True, gc=False):
    """The dialect's terminal marker (``[DONE]``, ``response.completed``, ``message_stop``)."""


class Fault(msgspec.Struct, frozen=True, gc=False):
    """An error the upstream sent inside a 200. Raw evidence for the classifier; ``message`` goes no further."""

    status: int | None
    code: str
    message: str


Event = Start | TextDelta | ReasoningDelta | ToolStart | ToolDelta | UsageReport | Finish | End | Fault


class Frame(msgspec.Struct, frozen=True):
    """``raw``: exactly what the upstream sent, whole. ``events``: what it means; empty for comments and pings."""

    raw: bytes
    events: tuple[Event, ...]


COMPLETE = "[COMPLETE]"  # what a model that is asked to go on says when nothing was missing


# --- requests -------------------------------------------------------------------------------------------------------


class Head(msgspec.Struct, frozen=True):
    """What routing needs to know of a request, read without building the whole body."""

    model: str
    stream: bool
    tools: bool
    images: bool
    include_usage: bool  # chat: the client asked for the usage chunk
    max_output_tokens: int | None
    prompt_tokens: int  # an estimate until the upstream reports
    conversation: int  # hash of the stable prefix: the same through all turns of one conversation
    streamable: bool = True  # nothing asked for is lost when the answer is streamed and put together again
    structured: bool = False  # the answer's text must fit a schema, or at least be JSON
    previous: str = ""  # the earlier answer that is named instead of sending the conversation
    kept: bool = False  # the client wants to be able to name the answer to this one


class Text(msgspec.Struct, frozen=True, tag="text"):
    """``cached``: the client marked the end of this block as a cache breakpoint."""

    text: str
    cached: bool = False


class Image(msgspec.Struct, frozen=True, tag="image"):
    """``url``: an ordinary or a ``data:`` URL."""

    url: str
    cached: bool = False


class Document(msgspec.Struct, frozen=True, tag="document"):
    """A file for the model to read. ``url``: an ordinary or a ``data:`` URL."""

    url: str
    name: str = ""
    cached: bool = False


class Reasoning(msgspec.Struct, frozen=True, tag="reasoning"):
    """Thinking of an earlier turn. ``signature`` seals it; ``sealed`` is thinking that only its vendor can read."""

    text: str
    signature: str = ""
    sealed: str = ""

    @property
    def seal(self) -> str:
        return self.signature or self.sealed


class ToolCall(msgspec.Struct, frozen=True, tag="tool_call"):
    """``arguments`` is JSON text, byte for byte as the model wrote it."""

    id: str
    name: str
    arguments: str
    signature: str = ""  # a thought signature that some vendors want back with the call
    cached: bool = False


class ToolResult(msgspec.Struct, frozen=True, tag="tool_result"):
    call_id: str
    content: tuple[Text | Image | Document, ...]
    is_error: bool = False
    cached: bool = False


Block = Text | Image | Document | Reasoning | ToolCall | ToolResult


class Message(msgspec.Struct, frozen=True):
    """One turn. Tool results stand in a ``user`` turn, as the richest dialect has it."""

    role: Literal["system", "user", "assistant"]
    blocks: tuple[Block, ...]


class Tool(msgspec.Struct, frozen=True):
    """``schema`` is the JSON Schema of the arguments, as bytes of the client's own body."""

    name: str
    description: str
    schema: msgspec.Raw
    strict: bool | None = None
    cached: bool = False


class ToolChoice(msgspec.Struct, frozen=True):
    """``name``: the one tool to call, for ``mode`` ``named``."""

    mode: Literal["auto", "none", "required", "named"]
    name: str = ""


class AnswerFormat(msgspec.Struct, frozen=True):
    """What the answer's text must be: any JSON object, or one that fits ``schema``."""

    kind: Literal["json_object", "json_schema"]
    name: str = ""
    schema: msgspec.Raw | None = None
    strict: bool | None = None


class Request(msgspec.Struct, frozen=True):
    """A whole request, for when it must be written in another dialect. ``dropped`` names what had no place here."""

    model: str
    stream: bool
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    reasoning_effort: str | None = None  # none | minimal | low | medium | high | xhigh | max
    reasoning_budget_tokens: int | None = None
    answer_format: AnswerFormat | None = None
    user: str | None = None
    dropped: tuple[str, ...] = ()


class Remembered(msgspec.Struct, frozen=True):
    """What came with the tool calls of one answer and clients tend to leave out when they send it back as history.

    The text of ``thinking`` is for whoever wants it. What is sealed is of use to its ``author`` alone: the seals on
    ``thinking``, ``details`` and ``signatures`` (by call id), the last two JSON as the vendor wants it back.
    """

    author: str
    thinking: tuple[Reasoning, ...] = ()
    details: str = ""
    signatures: dict[str, str] = {}

    @property
    def reasoning(self) -> str:
        """The thinking as one text."""
        return "\n\n".join([block.text for block in self.thinking if block.text])


Recall = Callable[[str], Remembered | None]
"""What is remembered of the answer that made a tool call, by the call's id; of one without calls, by ``seal_key``."""


def seal_key(seal: str) -> str:
    """What thinking is remembered by where no call is: its own seal, which nobody else's has."""
    return hashlib.blake2b(seal.encode("utf-8", "replace"), digest_size=16).hexdigest()


class Fix(msgspec.Struct, frozen=True):
    """What one upstream demands of a request in its dialect. The defaults are those of OpenAI's own API."""

    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] | None = None  # None: leave the client's choice
    developer_role: bool = True  # False: rewritten to ``system``
    string_tool_content: bool = False  # tool results must be a string, not a list of parts
    null_content: bool = True  # False: an assistant turn without text gets ""
    strict_arguments: bool = False  # arguments in history that are not JSON become "{}"
    unique_tool_names: bool = False  # later tools of the same name are dropped
    # Of turns that called tools. require: put back from memory, else padded with " "
    # In Messages "reject" is for thinking whose seal is not this upstream's own.
    reasoning_content: Literal["keep", "require", "reject"] = "keep"
    reasoning_details: bool = False  # True: put back where this upstream itself wrote them. False: stripped
    thought_signatures: bool = False  # the same for ``tool_calls[].extra_content``
    blank_signature: str = ""  # the ``extra_content`` (JSON) of a first call that has none of its own
    call_id_length: int | None = None  # ids of tool calls are exactly so many ASCII letters and digits
    call_id_limit: int | None = None  # ids of tool calls are at most so many ASCII letters, digits, "_" and "-"
    temperature: bool = True  # False: dropped, the server fixes it
    tool_choice_required: Literal["required", "any", "auto"] = "required"  # how this upstream spells "required"
    parallel_tool_calls: bool = True  # False: sends ``parallel_tool_calls: false`` when tools are offered
    # How a Messages request asks for thinking: by a budget of tokens, or by effort alone, where a budget is refused.
    thinking: Literal["budget", "adaptive"] = "budget"
    stream_usage: bool = True  # understands ``stream_options.include_usage``
    cache_markers: bool = False  # caches only what ``cache_control`` marks; we add the marks that a client left out
    # How a broken-off answer is taken up: a trailing assistant turn, bare or flagged, that the model goes on writing;
    # or, where the vendor documents no such thing, a user turn that asks for it.
    continuation: Literal["instructed", "trailing", "prefix", "partial", "flags"] = "instructed"
    continuation_root: str = ""  # the path such a request goes to instead of the base URL's own
    rejected_fields: tuple[str, ...] = ()  # top-level fields it answers 400 or 422 to


class Price(msgspec.Struct, frozen=True):
    """USD per million tokens. ``cached`` is the price of a prompt-cache hit."""

    input: float = 0.0
    output: float = 0.0
    cached: float | None = None

    @property
    def free(self) -> bool:
        return self.input == 0 and self.output == 0

    def cost_usd(self, input_tokens: float, output_tokens: float, cached_tokens: float = 0.0) -> float:
        cached = self.input if self.cached is None else self.cached
        return (
            (input_tokens - cached_tokens) * self.input + cached_tokens * cached + output_tokens * self.output
        ) / 1e6


class Upstream(msgspec.Struct, frozen=True):
    """One routable provider x key x model."""

    provider: str
    key: int  # place in the provider's key pool
    model: str  # the public name, as in metrics and routes
    wire_model: str  # what the provider calls it
    dialect: str
    context_tokens: int
    max_output_tokens: int | None
    price: Price
    tools: bool = True
    images: bool = False
    fix: Fix = Fix()
    fixes: tuple[tuple[str, Fix], ...] = ()  # by dialect, where it differs

    def in_dialect(self, dialect: str) -> Upstream:
        """The same upstream as it is reached in this dialect."""
        return msgspec.structs.replace(self, dialect=dialect, fix=dict(self.fixes).get(dialect, self.fix))

    @property
    def author(self) -> str:
        """Who can open what this upstream seals. Other models of the same vendor are known to refuse it."""
        return f"{self.provider}/{self.wire_model}"

    def __repr__(self) -> str:
        return f"<Upstream {self.provider}/{self.model}#{self.key}>"


# --- quotas ---------------------------------------------------------------------------------------------------------

Unit = Literal["requests", "tokens", "usd"]
Period = Literal["minute", "hour", "day", "month"]


class Limit(msgspec.Struct, frozen=True):
    """So many of a unit in a period, for the models a glob names.

    ``resets``: ``rolling`` (a bucket that refills evenly), ``minute`` (a wall-clock minute), or a time zone
    (``UTC``, ``America/Los_Angeles``): calendar hour, day or month there, daylight saving time included.
    """

    amount: float
    unit: Unit
    per: Period
    resets: str = "rolling"
    models: str = "*"

    @property
    def name(self) -> str:
        """The label in metrics and in ``status``: ``requests/day`` or ``requests/day *:free``."""
        suffix = "" if self.models == "*" else f" {self.models}"
        return f"{self.unit}/{self.per}{suffix}"


class LimitReport(msgspec.Struct, frozen=True):
    """What an upstream says of one of its limits, from headers or an error body. None: not said."""

    unit: Unit
    per: Period | None = None
    limit: float | None = None
    remaining: float | None = None
    reset_s: float | None = None  # from now until it is whole again (calendar) or has refilled (bucket)
