"""Everything this package raises on purpose.

Every message is one sentence that says what is wrong, what was got, what was expected and what to do.
The command line prints it on standard error and exits with 2.
"""


class EmpathyProbesError(Exception):
    """Base of every error raised on purpose."""


class InputError(EmpathyProbesError):
    """Something the caller gave is not usable: a path, a text, an option, a pair of models."""


class ProvenanceError(InputError):
    """Two results that do not come from the same stimuli were about to be compared."""


class StoreError(InputError):
    """A stored file is missing, damaged, or written by a newer version."""


class NonFiniteError(EmpathyProbesError):
    """A model produced NaN or infinity; the message names model, site, layer and item."""


def check_seed(seed: int) -> None:
    """Refuse a seed that no random generator takes.

    Raises:
        InputError: it is negative.
    """
    if seed < 0:
        raise InputError(f"seed got {seed}, expected 0 or more; choose another")
