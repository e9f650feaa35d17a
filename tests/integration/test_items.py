from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.integration.harness import Stack, problem

pytestmark = pytest.mark.integration

PATCH = {"content-type": "application/merge-patch+json"}


def make(api: httpx.Client, **fields: Any) -> httpx.Response:
    answer = api.post("/api/items", json={"name": "thing", **fields})
    assert answer.status_code == 201, answer.text
    return answer


def test_an_item_is_made_read_replaced_patched_and_deleted(api: httpx.Client) -> None:
    made = make(api, description="a thing", category="tools", metadata={"size": {"w": 1, "h": 2}})
    url = made.headers["location"]
    item = made.json()
    assert (item["version"], made.headers["etag"]) == (1, '"1"')
    assert item["created_at"].endswith("Z")
    read = api.get(url)
    assert read.json() == item
    assert read.headers["etag"] == '"1"'
    replaced = api.put(url, json={"name": "other"}).json()
    assert replaced == item | {
        "name": "other", "description": "", "category": None, "metadata": {}, "version": 2,
        "updated_at": replaced["updated_at"],
    }  # fmt: skip
    patched = api.patch(url, json={"metadata": {"size": {"w": 1}}, "category": "x"}, headers=PATCH)
    assert patched.status_code == 200
    assert patched.headers["etag"] == '"3"'
    again = api.patch(url, json={"metadata": {"size": {"h": 2}}, "category": None}).json()
    assert (again["metadata"], again["category"], again["name"]) == ({"size": {"w": 1, "h": 2}}, None, "other")
    gone = api.delete(url)
    assert (gone.status_code, gone.content) == (204, b"")
    assert "content-type" not in gone.headers
    problem(api.get(url), 404, "not-found")
    problem(api.delete(url), 404, "not-found")
    problem(api.put(url, json={"name": "x"}), 404, "not-found")
    problem(api.patch(url, json={"name": "x"}), 404, "not-found")


def test_pages_follow_each_other_without_gap_or_repeat(api: httpx.Client) -> None:
    category = uuid4().hex
    made = [make(api, name=f"item {number}", category=category).json()["id"] for number in range(7)]
    make(api, category="another")
    seen, url = [], f"/api/items?category={category}&limit=3"
    while url:
        answer = api.get(url)
        page = answer.json()
        seen += [item["id"] for item in page["items"]]
        link = answer.links.get("next")
        assert bool(link) == bool(page["next_cursor"])
        url = link["url"] if link else ""
    # Two replicas' ids of one second have no order between them.
    assert seen == sorted(made)
    assert len(api.get("/api/items").json()["items"]) <= 20


def test_page_parameters_are_checked(api: httpx.Client) -> None:
    for query in ("limit=0", "limit=101", "limit=x", "cursor=zzz", "category="):
        problem(api.get(f"/api/items?{query}"), 422, "invalid")


def test_a_known_version_is_not_sent_again(api: httpx.Client) -> None:
    url = make(api).headers["location"]
    for known in ('"1"', 'W/"1"', '"7", "1"', "*"):
        answer = api.get(url, headers={"If-None-Match": known})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", '"1"')
    assert api.get(url, headers={"If-None-Match": '"2"'}).status_code == 200


def test_a_stale_version_changes_nothing(api: httpx.Client) -> None:
    url = make(api).headers["location"]
    api.put(url, json={"name": "second"}, headers={"If-Match": '"1"'}).raise_for_status()
    for stale in ('"1"', 'W/"2"', "nonsense"):
        headers = {"If-Match": stale}
        problem(api.put(url, json={"name": "third"}, headers=headers), 412, "precondition-failed")
        problem(api.patch(url, json={"name": "third"}, headers=headers), 412, "precondition-failed")
        problem(api.delete(url, headers=headers), 412, "precondition-failed")
    assert api.get(url).json()["name"] == "second"
    assert api.delete(url, headers={"If-Match": '"9", "2"'}).status_code == 204


def test_concurrent_patches_all_count(api: httpx.Client) -> None:
    url = make(api).headers["location"]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda key: api.patch(url, json={"metadata": {key: 1}}), "abcd"))
    assert [answer.status_code for answer in answers] == [200] * 4
    assert api.get(url).json()["metadata"] == dict.fromkeys("abcd", 1)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": ""},
        {"name": "x" * 201},
        {"name": "x", "description": "x" * 2001},
        {"name": "x", "nmae": "y"},
        {"name": "x", "metadata": []},
        {"name": "x", "metadata": {"$set": 1}},
        {"name": "x", "metadata": {"a.b": 1}},
        {"name": "x", "metadata": {"a\0": 1}},
        {"name": "x", "metadata": {"a": 2**63}},
        {"name": "x", "metadata": {"a": "x" * 17_000}},
        {"name": "x", "metadata": {"a": [[[[[[[[[1]]]]]]]]]}},
    ],
)
def test_what_does_not_fit_is_refused(api: httpx.Client, body: dict[str, Any]) -> None:
    document = problem(api.post("/api/items", json=body), 422, "invalid")
    assert document["errors"][0]["loc"][0] == "body"
    url = make(api).headers["location"]
    problem(api.put(url, json=body), 422, "invalid")
    if body not in ({}, {"name": "x", "metadata": []}):
        problem(api.patch(url, json=body), 422, "invalid")


@pytest.mark.parametrize("body", [b"{", b'{"name": "\xff"}', b'{"name": NaN', b""])
def test_what_is_no_json_is_refused(api: httpx.Client, body: bytes) -> None:
    answer = api.post("/api/items", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)
    assert answer.headers["content-type"] == "application/problem+json"


def test_lone_surrogates_and_infinities_are_refused(api: httpx.Client) -> None:
    for body in (b'{"name": "x", "metadata": {"a": "\\ud800"}}', b'{"name": "x", "metadata": {"a": Infinity}}'):
        answer = api.post("/api/items", content=body, headers={"content-type": "application/json"})
        problem(answer, 422, "invalid")


@pytest.mark.parametrize("item_id", ["0" * 24, "nonsense", "x" * 500])
def test_no_such_item(api: httpx.Client, item_id: str) -> None:
    problem(api.get(f"/api/items/{item_id}"), 404, "not-found")


def test_the_same_key_makes_one_item(api: httpx.Client) -> None:
    headers = {"Idempotency-Key": uuid4().hex}
    first = api.post("/api/items", json={"name": "once"}, headers=headers)
    second = api.post("/api/items", json={"name": "once"}, headers=headers)
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json() == second.json()
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    problem(api.post("/api/items", json={"name": "other"}, headers=headers), 422, "key-reused")


def test_a_request_that_nginx_tries_twice_counts_once(stack: Stack) -> None:
    edge = {"X-Edge-Request-Id": uuid4().hex}
    one, two = (httpx.Client(base_url=replica, headers=edge) for replica in stack.replicas)
    with one, two:
        first, second = (client.post("/api/items", json={"name": "edge"}) for client in (one, two))
        assert first.json() == second.json()
        assert "idempotent-replayed" not in second.headers
        url, headers = first.headers["location"], {"If-Match": '"1"', "X-Edge-Request-Id": uuid4().hex}
        changes = [client.put(url, json={"name": "changed"}, headers=headers) for client in (one, two)]
        assert [change.status_code for change in changes] == [200, 200]
        assert one.get(url).json()["version"] == 2
