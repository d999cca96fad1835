"""Functions without a derivative, which say so: a gradient of 0 would pass for a number."""

from collections.abc import Callable

import jax


def without_derivative(function: Callable, reason: str) -> Callable:
    """``function``; a gradient that comes to what it returns is refused, and so is forward mode.

    Nothing is refused where no gradient comes: where arguments are constants, or ``jax.lax.stop_gradient`` stands
    before or behind.

    Args:
      function: of pytrees of arrays.
      reason: the message of the NotImplementedError.
    """
    call = jax.custom_vjp(function)

    def refuse(*_):
        raise NotImplementedError(reason)

    call.defvjp(lambda *arguments: (call(*arguments), None), refuse)

    def call_or_refuse(*arguments):
        try:
            return call(*arguments)
        except TypeError as error:
            if "forward-mode" not in str(error):
                raise
            raise NotImplementedError(reason) from error

    return call_or_refuse
