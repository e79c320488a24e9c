"""What the stores refuse, as clients read it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from deepseek.errors import DeepseekError
from deepseek.serve.api.errors import ApiError
from deepseek.serve.state.errors import NotFoundError, QuotaError, RequestError

_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def stores_errors() -> Iterator[None]:
    """Turn what a store refuses into an ApiError. What is the server's own trouble is logged and
    not told: it may name files and addresses."""
    try:
        yield
    except RequestError as error:
        raise ApiError(400, str(error), param=error.param) from error
    except NotFoundError as error:
        raise ApiError(404, str(error), param="id", code="not_found") from error
    except QuotaError as error:
        status = 429 if error.is_passing else 413
        raise ApiError(status, str(error), code="quota_exceeded") from error
    except DeepseekError as error:
        _LOG.error("state: %s", error)
        message = "The server cannot read or keep its state now."
        raise ApiError(503, message, code="state_unavailable", retry_after_s=5) from error
