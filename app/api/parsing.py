"""What texts of a request are: ids, cursors, and content that is checked once it is known."""

from typing import Any, TypeVar
from uuid import UUID

from bson import ObjectId
from bson.errors import InvalidId
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from app import problems

Model = TypeVar("Model", bound=BaseModel)


def object_id(text: str, absent: str) -> ObjectId:
    """The id that `text` is. What is no id is nobody's: raises `NotFound` with the detail `absent`."""
    try:
        return ObjectId(text)
    except InvalidId:
        raise problems.NotFound(absent) from None


def uuid(text: str, absent: str) -> str:
    """The UUID that `text` is, in its usual form; raises likewise."""
    try:
        return str(UUID(text))
    except ValueError:
        raise problems.NotFound(absent) from None


def position(cursor: str | None) -> ObjectId | None:
    """The id after which a page begins, None for the first. Raises `Invalid`."""
    try:
        return None if cursor is None else ObjectId(cursor)
    except InvalidId:
        raise problems.Invalid("The cursor is not one that this API gave.") from None


def validated(model: type[Model], content: Any, *where: str) -> Model:
    """`content` as `model`; what does not fit is refused as FastAPI does (422), found in the body below `where`."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise RequestValidationError(
            [{**row, "loc": ("body", *where, *row["loc"])} for row in error.errors()]
        ) from error
