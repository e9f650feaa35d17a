"""Keyset pages by `_id`, alike in all services."""

from typing import Annotated
from urllib.parse import urlencode

from fastapi import Query, Request, Response

from app.api.dependencies import PrincipalDep
from app.api.parsing import position
from app.database import Document


class Page:
    """Which rows a client asks for (`limit`, `cursor`), and whose it may see; a dependency."""

    def __init__(
        self,
        request: Request,
        response: Response,
        principal: PrincipalDep,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        cursor: Annotated[str | None, Query(description="`next_cursor` of the page before.")] = None,
    ) -> None:
        self._path, self._response = f"{request.scope['root_path']}{request.scope['route'].path}", response
        self._limit = limit
        self.limit = limit + 1  # one more tells whether there is a next page
        self.owner = None if principal.admin else principal.id
        self.after = position(cursor)

    def cut(self, rows: list[Document]) -> tuple[list[Document], str | None]:
        """The rows of this page and the cursor of the next, which `Link` names too (RFC 8288)."""
        page = rows[: self._limit]
        if len(rows) <= self._limit:
            return page, None
        cursor = str(page[-1]["_id"])
        query = urlencode({"limit": self._limit, "cursor": cursor})
        self._response.headers["Link"] = f'<{self._path}?{query}>; rel="next"'
        return page, cursor
