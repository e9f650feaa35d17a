import pytest

from app.api.preconditions import entity_tag, expected_versions, not_modified


def test_the_tag_is_the_version_and_strong():
    assert entity_tag(12) == '"12"'


@pytest.mark.parametrize("version", [1, 42, 10**17])
def test_a_tag_names_its_version(version: int):
    assert expected_versions(entity_tag(version)) == [version]
    assert not_modified(entity_tag(version), version)


@pytest.mark.parametrize("header", [None, "*", " * "])
def test_if_match_allows_any_version(header: str | None):
    assert expected_versions(header) is None


@pytest.mark.parametrize(
    ("header", "versions"),
    [
        ('"1"', [1]),
        (' "1" , "22","333"', [1, 22, 333]),
        # Weak tags never match (RFC 9110, section 13.1.1), nor does what was never given out.
        ('W/"1"', []),
        ('W/"1", "2"', [2]),
        ("1", []),
        ('"x", "-1", "1.0", " 1", ""', []),
        ('"1', []),
        ("", []),
        ('"*"', []),
        ('"' + "9" * 19 + '"', []),
        ('"' + "9" * 18 + '"', [10**18 - 1]),
    ],
)
def test_if_match_names_versions(header: str, versions: list[int]):
    assert expected_versions(header) == versions


@pytest.mark.parametrize("header", ["*", ' "7" ', 'W/"7"', '"1", W/"7"', '"x","7"'])
def test_if_none_match_names_the_present_version(header: str):
    assert not_modified(header, 7)


@pytest.mark.parametrize("header", [None, "", '"8"', 'W/"77"', "7", 'w/"7"', '"*"', '"7'])
def test_if_none_match_names_another_version(header: str | None):
    assert not not_modified(header, 7)
