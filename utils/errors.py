"""Errors that are the user's to mend.

Every message names the field or file, the value that was found, and what to do. Scripts print the message alone and
exit with status 2; a traceback is reserved for faults of the program itself.
"""

from __future__ import annotations

ELLIPSIS = "..."


class InputError(ValueError):
    """Input (a file, a setting, a prompt) that cannot be used; the message says which, why, and the remedy."""


def shown(text: object, limit: int = 300) -> str:
    """`text` for a message: what does not print is escaped, and of more than `limit` characters the middle is cut."""
    whole = str(text)
    if len(whole) > limit:
        head = (limit - len(ELLIPSIS)) * 2 // 3
        whole = f"{whole[:head]}{ELLIPSIS}{whole[len(whole) - (limit - len(ELLIPSIS) - head) :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in whole)
