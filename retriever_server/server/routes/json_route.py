"""Routes that read JSON: FastAPI writes their OpenAPI page, and does not stand between them and a request."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, get_type_hints

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from retriever_server.server.schema import Body


class JsonRoute(APIRoute):
    """A route whose endpoint takes `(body, caller)`; one without a `body` is served by FastAPI.

    The body is JSON whatever its type says (`curl -d` says another), checked once, and the answer is sent as
    the endpoint made it: dependencies and exit stacks would cost as much as a search.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        hints = get_type_hints(endpoint, include_extras=True)
        self._model: type[Body] | None = hints.get("body")
        self._caller_of = hints["caller"].__metadata__[0].dependency if self._model else None

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; errors are answered by `errors.answer_error`."""
        if self._model is None or scope["method"] not in (self.methods or ()):
            return await super().handle(scope, receive, send)
        request = Request(scope, receive)
        body = await self.read(request)
        answer = await self.endpoint(body, await self._caller_of(request))
        await answer(scope, receive, send)

    async def read(self, request: Request) -> Body:
        """Return the body as the model of the endpoint."""
        assert self._model is not None
        try:
            content = json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, f"body: not JSON ({error})") from error
        return parse_body(self._model, content)


def parse_body(model: type[Body], content: Any) -> Any:
    """Return the content as the model, or raise what says which field is wrong."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None
