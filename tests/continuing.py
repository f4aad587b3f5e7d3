"""What a scripted model says when it is asked to go on with an answer that broke off."""

from __future__ import annotations

from routerd.proxy.scripts import gone_on_with

__all__ = ["gone_on_with"]
