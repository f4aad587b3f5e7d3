"""xAI: money is a 403 with a code of its own, beside ``error`` and not inside it."""

from routerd.policy.classify import Code
from routerd.providers.provider import Provider

PROVIDER = Provider(
    names=("xai",),
    hosts=("api.x.ai",),
    codes={
        "personal-team-blocked:spending-limit": Code.BALANCE,
        "subscription:free-usage-exhausted": Code.QUOTA_PLAN,
    },
    phrases=(("spending-limit", Code.BALANCE),),
)
