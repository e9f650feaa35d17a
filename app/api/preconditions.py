"""Entity tags and preconditions (RFC 9110, sections 8.8.3 and 13.1): an item's tag is its version."""

import re

STRONG_TAG = re.compile(r'"(\d{1,18})"')
ANY_TAG = re.compile(r'(?:W/)?"(\d{1,18})"')


def entity_tag(version: int) -> str:
    """The strong tag of a version."""
    return f'"{version}"'


def expected_versions(if_match: str | None) -> list[int] | None:
    """The versions that `If-Match` allows; None where it allows any that exists. Weak tags never match."""
    if if_match is None or if_match.strip() == "*":
        return None
    matches = (STRONG_TAG.fullmatch(tag.strip()) for tag in if_match.split(","))
    return [int(match[1]) for match in matches if match]


def not_modified(if_none_match: str | None, version: int) -> bool:
    """Whether `If-None-Match` names the present version (weak comparison), so that 304 is the answer."""
    if if_none_match is None:
        return False
    if if_none_match.strip() == "*":
        return True
    matches = (ANY_TAG.fullmatch(tag.strip()) for tag in if_none_match.split(","))
    return any(match is not None and int(match[1]) == version for match in matches)
