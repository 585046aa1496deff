"""Text from the run's files, safe to put into HTML."""

from __future__ import annotations

import html
import re
from typing import Any

from rlhf_fast.tracking.numbers import short

# Controls are shown as their pictures (␀, ␛ ...), but line ends and tabs; a lone surrogate is no character.
_SHOWN = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_SHOWN |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_SURROGATE = re.compile("[\ud800-\udfff]")


def plain(text: Any) -> str:
    """`text` without characters that a page or a terminal would act on."""
    return _SURROGATE.sub("\ufffd", str(text)).translate(_SHOWN)


def number(value: float | None) -> str:
    """A number for people, with a real minus sign."""
    return short(value).replace("-", "−")


def esc(text: Any) -> str:
    """`text` for HTML, in an element or a quoted attribute."""
    return html.escape(plain(text), quote=True)
