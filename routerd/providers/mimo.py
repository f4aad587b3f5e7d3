"""Xiaomi MiMo.

A token plan answers a burst of parallel requests with 402 "Insufficient account funds", while the plan has plenty left
(XiaomiMiMo/MiMo#99, 2026-09-23). The documented words for an empty account are others ("Insufficient account
balance"), so the words decide, and a burst only pauses the upstream.
Its schema rules are its own: a turn of history that others take can be refused here.
"""

from routerd.policy.classify import Code
from routerd.providers.provider import Provider

PROVIDER = Provider(
    names=("mimo", "mimo-token-plan-cn", "mimo-token-plan-sgp", "mimo-token-plan-ams"),
    hosts=("xiaomimimo.com",),
    phrases=(
        ("insufficient account funds", Code.CONCURRENCY),
        ("not supported model", Code.MODEL_NOT_FOUND),
        ("text is not", Code.UNSUPPORTED_FEATURE),  # content null, or a list of parts, in a tool turn
        ("text` is not", Code.UNSUPPORTED_FEATURE),
        ("must be passed back", Code.UNSUPPORTED_FEATURE),  # reasoning_content of an earlier turn
    ),
    rows=(),
)
