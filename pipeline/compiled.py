"""Loops over pixels as machine code for the CPU at hand, by Numba.

A compiled function calls none of another file: Numba's cache on disk watches the file of the
outermost function only, and what another one holds would be used in its old form.

What makes such loops fast, each measured here: one result in each innermost loop, over neighbouring
bytes of arrays that the compiler can tell apart (then it uses vector instructions, 5 to 20 times
faster); NumPy's narrow types wherever a Python number would widen the arithmetic.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numba

Function = TypeVar("Function", bound=Callable[..., Any])
Scalar = Any  # of NumPy: its type decides the precision of the arithmetic and the vectors' width


def compiled(function: Function) -> Function:
    """Compile at the first call and keep the result beside the file or in the user's cache.

    Python's lock is free while it runs. Where the result can be written nowhere, each process
    compiles for itself.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}  # no check of divisors
    try:
        done: Any = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no place for the cache
        done = numba.njit(**options)(function)
    return done  # type: ignore[no-any-return]
