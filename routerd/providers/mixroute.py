"""MixRoute, and other gateways of the new-api kind: a model none of its channels offers is a 503."""

from routerd.policy.classify import Code
from routerd.providers.provider import Provider

PROVIDER = Provider(
    names=("mixroute",),
    hosts=("api.mixroute.ai", "console.mixroute.io"),
    phrases=(
        ("no available channel", Code.MODEL_NOT_FOUND),
        ("无可用渠道", Code.MODEL_NOT_FOUND),
        ("quota is not enough", Code.BALANCE),
    ),
    rows=(),
)
