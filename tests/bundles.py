"""Eval bundles held in memory, for tests."""

from __future__ import annotations

from collections.abc import Mapping

from nanochat.common.errors import UserError
from nanochat.evaluation.core.bundle import FETCH_AGAIN, Bundle


def bundle_of(name: str, texts: Mapping[str, str]) -> Bundle:
    """A bundle whose files are these texts, by their paths in it."""

    def pieces(member: str) -> list[bytes]:
        if member not in texts:
            raise UserError(f"{name}/{member}: the file is missing. {FETCH_AGAIN}")
        return [texts[member].encode("utf-8")]

    return Bundle(name, pieces)
