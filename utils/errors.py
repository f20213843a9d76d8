"""Errors that are the user's to mend.

Every message names the field or file, the value that was found, and what to do. Scripts print the message alone and
exit with status 2; a traceback is reserved for faults of the program itself.
"""

from __future__ import annotations


class InputError(ValueError):
    """Input (a file, a setting, a prompt) that cannot be used; the message says which, why, and the remedy."""
