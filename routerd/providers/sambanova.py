"""SambaNova Cloud: requests per minute and per day; resets as an epoch or as a duration (docs, "Rate limits")."""

from routerd.providers.limit_headers import row
from routerd.providers.provider import Provider

PROVIDER = Provider(
    names=("sambanova",),
    hosts=("api.sambanova.ai",),
    rows=(row("requests", "minute", "requests"), row("requests", "day", "requests-day")),
)
