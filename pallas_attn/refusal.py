"""Functions that refuse differentiation: a silent gradient of 0 would pass for a result."""

import contextlib
from collections.abc import Callable, Iterator

import jax


def without_derivative(function: Callable, reason: str) -> Callable:
    """Returns ``function`` with a derivative that raises NotImplementedError, in reverse and in forward mode.

    It does not raise when no gradient reaches it: with constant arguments, or with ``jax.lax.stop_gradient`` on its
    arguments or its result.

    Args:
      function: takes and returns pytrees of arrays.
      reason: the message of the NotImplementedError.
    """
    call = jax.custom_vjp(function)

    def refuse(*_):
        raise NotImplementedError(reason)

    call.defvjp(lambda *arguments: (call(*arguments), None), refuse)

    def call_or_refuse(*arguments):
        with no_forward_mode(NotImplementedError(reason)):
            return call(*arguments)

    return call_or_refuse


@contextlib.contextmanager
def no_forward_mode(refusal: Exception) -> Iterator[None]:
    """Raises ``refusal`` where JAX finds no rule for forward mode, which names the rule but no remedy."""
    try:
        yield
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise refusal from error
