import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from uuid import uuid4

import httpx
import pymongo
import pytest

from tests.integration.harness import Stack, paused, problem, wait_until

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


def test_a_repeat_is_answered_like_the_first_time_when_the_item_was_changed_or_deleted(api: httpx.Client) -> None:
    headers = {"Idempotency-Key": uuid4().hex}
    body = {"name": "once", "category": "tools", "metadata": {"a": 1}}
    first = api.post("/api/items", json=body, headers=headers)
    url = first.headers["location"]

    def assert_answered_again() -> None:
        again = api.post("/api/items", json=body, headers=headers)
        assert (again.status_code, again.json()) == (201, first.json())
        assert (again.headers["etag"], again.headers["location"]) == ('"1"', url)
        assert again.headers["idempotent-replayed"] == "true"
        problem(api.post("/api/items", json={"name": "other"}, headers=headers), 422, "key-reused")

    api.put(url, json={"name": "changed"}).raise_for_status()
    api.patch(url, json={"metadata": {"b": 2}}, headers=PATCH).raise_for_status()
    assert_answered_again()
    assert api.get(url).json()["version"] == 3
    api.delete(url).raise_for_status()
    assert_answered_again()
    problem(api.get(url), 404, "not-found")


def test_a_deleted_item_is_on_no_page_and_cannot_be_changed(api: httpx.Client) -> None:
    category = uuid4().hex
    made = [make(api, category=category).headers["location"] for _ in range(5)]
    for url in made[1:4]:
        assert api.delete(url).status_code == 204
        problem(api.put(url, json={"name": "x"}), 404, "not-found")
        problem(api.put(url, json={"name": "x"}, headers={"If-Match": '"2"'}), 404, "not-found")
        problem(api.patch(url, json={"name": "x"}), 404, "not-found")
        problem(api.delete(url), 404, "not-found")
    found = [item["id"] for item in api.get(f"/api/items?category={category}").json()["items"]]
    assert found == [made[0].rpartition("/")[2], made[4].rpartition("/")[2]]
    seen, cursor = set(), made[0].rpartition("/")[2]
    while cursor:
        page = api.get(f"/api/items?limit=100&cursor={cursor}").json()
        seen |= {item["id"] for item in page["items"]}
        cursor = page["next_cursor"]
    assert not seen & {url.rpartition("/")[2] for url in made[1:4]}


@pytest.fixture
def replays(stack: Stack) -> Callable[..., list[httpx.Response]]:
    """Send one request twice, as nginx does when a replica dies: to both replicas, by the same edge key."""

    def send(
        method: str, url: str, *, between: Callable[[], object] = lambda: None, headers: Any = None, **fields: Any
    ) -> list[httpx.Response]:
        same = {**(headers or {}), "X-Edge-Request-Id": uuid4().hex}
        first = httpx.request(method, stack.replicas[0] + url, headers=same, **fields)
        between()
        return [first, httpx.request(method, stack.replicas[1] + url, headers=same, **fields)]

    return send


def test_a_create_that_nginx_tries_twice_counts_once(replays: Callable[..., list[httpx.Response]]) -> None:
    first, second = replays("POST", "/api/items", json={"name": "edge"})
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json() == second.json()
    assert "idempotent-replayed" not in second.headers


@pytest.mark.parametrize("headers", [{}, {"If-Match": '"2"'}])
@pytest.mark.parametrize("method", ["PUT", "PATCH"])
@pytest.mark.parametrize("then", [None, "PATCH", "DELETE"])
def test_a_change_that_nginx_tries_twice_counts_once(
    api: httpx.Client, replays: Callable[..., list[httpx.Response]], headers: dict[str, str], method: str, then: Any
) -> None:
    body = {"name": "changed", "metadata": {"b": 2}}
    url = make(api, metadata={"a": 1}).headers["location"]
    api.put(url, json={"name": "before", "metadata": {"a": 1}}).raise_for_status()

    def between() -> None:
        if then == "PATCH":
            api.patch(url, json={"name": "by another"}).raise_for_status()
        elif then == "DELETE":
            api.delete(url).raise_for_status()

    first, second = replays(method, url, between=between, json=body, headers=headers)
    assert [answer.status_code for answer in (first, second)] == [200, 200], second.text
    assert first.json() == second.json()
    assert first.headers["etag"] == second.headers["etag"] == '"3"'
    if then != "DELETE":
        name, version = ("changed", 3) if then is None else ("by another", 4)
        item = api.get(url).json()
        assert (item["name"], item["version"]) == (name, version)


@pytest.mark.parametrize("headers", [{}, {"If-Match": '"1"'}])
def test_a_delete_that_nginx_tries_twice_counts_once(
    api: httpx.Client, replays: Callable[..., list[httpx.Response]], headers: dict[str, str]
) -> None:
    url = make(api).headers["location"]
    answers = replays("DELETE", url, headers=headers)
    assert [answer.status_code for answer in answers] == [204, 204]
    # Somebody else's is another request.
    problem(api.delete(url), 404, "not-found")


def at_once(requests: list[Callable[[], httpx.Response]]) -> list[httpx.Response]:
    with ThreadPoolExecutor(len(requests)) as pool:
        return [answer.result() for answer in [pool.submit(request) for request in requests]]


def test_a_patch_that_is_tried_twenty_times_at_once_counts_once(stack: Stack, api: httpx.Client) -> None:
    url = make(api).headers["location"]
    headers = {"X-Edge-Request-Id": uuid4().hex, **PATCH}

    def patch(number: int) -> httpx.Response:
        return httpx.patch(
            stack.replicas[number % 2] + url, content=b'{"metadata": {"a": 1}}', headers=headers, timeout=30
        )

    answers = at_once([partial(patch, number) for number in range(20)])
    assert {answer.status_code for answer in answers} == {200}
    (only,) = {answer.text for answer in answers}
    assert api.get(url).json() == answers[0].json()
    assert answers[0].json()["version"] == 2, only


def test_deletes_that_race_are_answered_once_each(stack: Stack, api: httpx.Client) -> None:
    url = make(api).headers["location"]
    edge = uuid4().hex

    def delete(number: int) -> httpx.Response:
        key = edge if number < 10 else uuid4().hex
        return httpx.delete(stack.replicas[number % 2] + url, headers={"X-Edge-Request-Id": key}, timeout=30)

    statuses = [answer.status_code for answer in at_once([partial(delete, number) for number in range(14)])]
    # The ten are one request: it was the one that deleted the item, or it came too late.
    assert set(statuses[:10]) in ({204}, {404})
    assert [*statuses[10:], statuses[0]].count(204) == 1


def test_a_delete_that_races_with_repeats_of_its_create_leaves_no_second_item(stack: Stack, api: httpx.Client) -> None:
    with pymongo.MongoClient(stack.settings.mongodb_url.get_secret_value()) as database:
        items = database["stack"]["items"]
        for _ in range(5):
            headers, body = {"Idempotency-Key": uuid4().hex}, {"name": uuid4().hex, "category": uuid4().hex}
            first = api.post("/api/items", json=body, headers=headers)

            def create(number: int, headers: Any = headers, body: Any = body) -> httpx.Response:
                return httpx.post(f"{stack.replicas[number % 2]}/api/items", json=body, headers=headers, timeout=30)

            def delete(url: str = first.headers["location"]) -> httpx.Response:
                return httpx.delete(stack.url + url, timeout=30)

            repeats = [partial(create, number) for number in range(6)]
            *answers, gone = at_once([*repeats, delete])
            assert gone.status_code == 204
            assert {answer.text for answer in answers} == {first.text}
            problem(api.get(first.headers["location"]), 404, "not-found")
            assert api.get(f"/api/items?category={body['category']}").json()["items"] == []
            assert items.count_documents({"name": body["name"]}) == 0


def test_what_a_dying_replica_was_changing_is_done_by_the_next(stack: Stack, api: httpx.Client) -> None:
    urls = [make(api).headers["location"] for _ in range(18)]
    victim = stack.pid("api-2")

    def change(number: int) -> httpx.Response:
        method, url = ("PUT", "PATCH", "DELETE")[number % 3], stack.url + urls[number]
        body = {} if method == "DELETE" else {"json": {"name": "changed"}}
        return httpx.request(method, url, headers={"If-Match": '"1"'}, timeout=30, **body)

    with ThreadPoolExecutor(len(urls)) as pool:
        # What the database gets from the dead replica it applies when it goes on: the next one finds it done.
        with paused(stack, "database"):
            hanging = [pool.submit(change, number) for number in range(len(urls))]
            time.sleep(0.5)
            os.kill(victim, signal.SIGKILL)
            time.sleep(0.2)
        answers = [answer.result() for answer in hanging]
    assert [answer.status_code for answer in answers] == [200, 200, 204] * 6
    assert {answer.json()["version"] for answer in answers if answer.status_code == 200} == {2}
    left = [api.get(url) for url in urls]
    assert [answer.status_code for answer in left] == [200, 200, 404] * 6
    assert {answer.json()["version"] for answer in left if answer.status_code == 200} == {2}
    wait_until(stack.settled, 60)
