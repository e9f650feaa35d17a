"""Schedules: every fire is made once, whoever dies or races, and what was missed follows `catch_up`."""

import asyncio
import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import psutil
import pymongo
import pytest
import redis
from bson import ObjectId

from app.context import Context
from app.database.documents import present
from app.engine.identity import fire_uuid
from app.engine.schedules import WAITING_MAX, Schedules
from deploy.native.supervision import Supervisor
from tests.integration.harness import Stack, bearer, finished, new_key, problem, wait_until

pytestmark = pytest.mark.integration

WORDS = {"name": "words", "task": "light.count_words", "payload": {"text": "to be"}}
SECOND = timedelta(seconds=1)


@pytest.fixture(scope="module")
def admin(stack: Stack) -> dict[str, str]:
    return bearer(new_key(stack, "--admin"))


@pytest.fixture
def operator(stack: Stack, admin: dict[str, str]) -> Iterator[httpx.Client]:
    """A client with a key of admin scope, which leaves no schedule behind."""
    with httpx.Client(base_url=stack.url, timeout=30, headers=admin) as client:
        yield client
        for row in client.get("/api/schedules?limit=100").json()["schedules"]:
            client.delete(f"/api/schedules/{row['id']}")


@pytest.fixture
def fires(stack: Stack) -> Iterator[Any]:
    with pymongo.MongoClient(stack.settings.mongodb_url.get_secret_value(), tz_aware=True) as client:
        yield client["stack"]["schedule_fires"]


@pytest.fixture
def beat(stack: Stack) -> Iterator[Supervisor]:
    """Beat is stopped; it runs again after the test."""
    supervisor = Supervisor(stack.layout)
    supervisor.stop(["beat"])
    yield supervisor
    if not supervisor.processes()["beat"].pid:
        supervisor.start("beat")
    wait_until(stack.settled, 60)


def create(operator: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = operator.post("/api/schedules", json={**WORDS, **fields})
    assert answer.status_code == 201, answer.text
    return answer.json()


def patch(operator: httpx.Client, schedule: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return operator.patch(f"/api/schedules/{schedule['id']}", json=fields).raise_for_status().json()


def rows_of(fires: Any, schedule: dict[str, Any], status: str | None = None) -> list[dict[str, Any]]:
    query = {"schedule_id": ObjectId(schedule["id"])} | ({"status": status} if status else {})
    return sorted(fires.find(query), key=lambda row: row["fire_time"])


def made(fires: Any, schedule: dict[str, Any], count: int, seconds: float = 60) -> list[dict[str, Any]]:
    """The fires of a schedule once at least `count` are published."""

    def enough() -> list[dict[str, Any]] | None:
        rows = rows_of(fires, schedule, "published")
        return rows if len(rows) >= count else None

    return wait_until(enough, seconds)


def each_once(operator: httpx.Client, records: redis.Redis, rows: list[dict[str, Any]]) -> None:
    assert len({row["task_id"] for row in rows}) == len(rows)
    for row in rows:
        document = finished(operator, row["task_id"])
        assert (document["status"], document["attempts"]) == ("SUCCESS", 1)
        assert records.hget(f"task:{row['task_id']}", "publishes") == "1"


def without_gap(rows: list[dict[str, Any]], step: timedelta = SECOND) -> None:
    times = [row["fire_time"] for row in rows]
    assert times == [times[0] + number * step for number in range(len(times))]


def at_rest(operator: httpx.Client, fires: Any, schedule: dict[str, Any]) -> list[dict[str, Any]]:
    """All fires of a schedule that is paused now."""
    patch(operator, schedule, enabled=False)
    wait_until(lambda: not rows_of(fires, schedule, "pending"))
    return rows_of(fires, schedule)


def test_an_interval_fires_each_time_once(operator: httpx.Client, fires: Any, records: redis.Redis) -> None:
    schedule = create(operator, interval=1)
    created = datetime.fromisoformat(schedule["created_at"])
    made(fires, schedule, 5)
    rows = at_rest(operator, fires, schedule)
    without_gap(rows)
    assert rows[0]["fire_time"] == datetime.fromisoformat(schedule["next_run"])
    assert timedelta(0) <= rows[0]["fire_time"] - created <= SECOND
    each_once(operator, records, rows)
    shown = operator.get(f"/api/schedules/{schedule['id']}").json()
    assert datetime.fromisoformat(shown["last_run"]) == rows[-1]["fire_time"]
    assert shown["next_run"] is None
    assert [fire["task_id"] for fire in shown["fires"]] == [row["task_id"] for row in rows[:-11:-1]]
    assert {fire["status"] for fire in shown["fires"]} == {"published"}


def test_a_crontab_fires_in_its_zone(operator: httpx.Client, fires: Any, records: redis.Redis) -> None:
    hour = (datetime.now(UTC) + timedelta(hours=5)).hour
    daily = create(operator, crontab=f"30 {hour} * * *", timezone="Asia/Kolkata")  # half an hour off all hours
    assert datetime.fromisoformat(daily["next_run"]).minute == 0
    schedule = create(operator, crontab="*/2 * * * * *", timezone="Europe/Berlin")
    made(fires, schedule, 2)
    rows = at_rest(operator, fires, schedule)
    without_gap(rows, 2 * SECOND)
    assert {row["fire_time"].second % 2 for row in rows} == {0}
    each_once(operator, records, rows)


def test_a_change_is_picked_up_while_beat_runs(operator: httpx.Client, fires: Any, stack: Stack) -> None:
    pid = stack.pid("beat")
    schedule = create(operator, interval=3600)
    patch(operator, schedule, interval=1)
    made(fires, schedule, 2)
    patch(operator, schedule, payload={"text": "to be or not"})

    def counted() -> bool:
        (row,) = rows_of(fires, schedule, "published")[-1:]
        return finished(operator, row["task_id"])["result"]["words"] == 4

    wait_until(counted)
    assert stack.pid("beat") == pid


def test_what_is_paused_does_not_fire_and_what_is_resumed_fires_from_then_on(
    operator: httpx.Client, fires: Any
) -> None:
    schedule, other = create(operator, interval=1, catch_up="all"), create(operator, interval=1)
    made(fires, schedule, 1)
    rows = at_rest(operator, fires, schedule)
    count = len(rows_of(fires, other))
    made(fires, other, count + 3)
    assert rows_of(fires, schedule) == rows
    resumed = patch(operator, schedule, enabled=True)
    later = made(fires, schedule, len(rows) + 1)
    assert later[len(rows)]["fire_time"] == datetime.fromisoformat(resumed["next_run"])


def test_a_deleted_schedule_fires_no_more(operator: httpx.Client, fires: Any) -> None:
    schedule, other = create(operator, interval=1), create(operator, interval=1)
    made(fires, schedule, 1)
    assert operator.delete(f"/api/schedules/{schedule['id']}").status_code == 204
    problem(operator.get(f"/api/schedules/{schedule['id']}"), 404, "not-found")
    rows = rows_of(fires, schedule)
    made(fires, other, len(rows_of(fires, other)) + 3)
    assert len(rows_of(fires, schedule)) <= len(rows) + 1  # one that was being planned


@pytest.mark.timeout(180)
async def test_loops_that_run_at_once_make_each_fire_once(
    stack: Stack, operator: httpx.Client, fires: Any, context: Context, records: redis.Redis
) -> None:
    """Beside beat's own three more, without a lease between them, over schedules that are due at the same times."""
    settings = stack.settings.model_copy(update={"schedule_interval": 0.1})
    rivals = [Schedules(context.schedules, context.fires, context.tasks, settings) for _ in range(3)]
    loops = [asyncio.create_task(rival.run()) for rival in rivals]
    try:
        schedules = [create(operator, interval=1) for _ in range(3)]
        for schedule in schedules:
            await asyncio.to_thread(made, fires, schedule, 5)
    finally:
        for loop in loops:
            loop.cancel()
        await asyncio.wait(loops)
    for schedule in schedules:
        rows = await asyncio.to_thread(at_rest, operator, fires, schedule)
        without_gap(rows)
        await asyncio.to_thread(each_once, operator, records, rows)


@pytest.mark.timeout(180)
def test_a_beat_that_is_killed_loses_no_fire(
    stack: Stack, operator: httpx.Client, fires: Any, records: redis.Redis
) -> None:
    stack.run("scale", "beat=2")
    try:
        schedule = create(operator, interval=1, catch_up="none")
        rows = made(fires, schedule, 2)
        for _ in range(2):  # whichever leads by then
            for name in ("beat", "beat-2"):
                psutil.Process(stack.pid(name)).kill()
                count = len(rows)
                rows = made(fires, schedule, count + 2)
        rows = at_rest(operator, fires, schedule)
        without_gap(rows)
        each_once(operator, records, rows)
    finally:
        wait_until(stack.settled, 60)
        stack.run("scale", "beat=1")


async def test_a_crash_after_the_row_or_after_the_publish_makes_the_fire_once(
    operator: httpx.Client, fires: Any, context: Context, records: redis.Redis, beat: Supervisor
) -> None:
    """The row without its task; the row whose task was published; the row of a schedule that is still due."""
    schedules = [create(operator, interval=3600) for _ in range(3)]
    secret = context.settings.identity_secret.get_secret_value()
    rows = []
    for schedule in schedules:
        moment = present() - SECOND
        rows.append(
            {
                "schedule_id": ObjectId(schedule["id"]),
                "fire_time": moment,
                "task_id": fire_uuid(secret, schedule["id"], moment.isoformat(timespec="milliseconds")),
                "task": WORDS["task"],
                "payload": '{"text":"to be"}',
                "owner": "",
            }
        )
        await context.fires.add(rows[-1:])
    loop = Schedules(context.schedules, context.fires, context.tasks, context.settings)
    published, due = rows[1:]
    stored = await context.database["schedule_fires"].find_one({"task_id": published["task_id"]})
    await loop.publish([stored])
    await context.database["schedule_fires"].update_one(
        {"_id": stored["_id"]}, {"$set": {"status": "pending", "retry_at": present()}}
    )
    anchor = due["fire_time"] - timedelta(hours=1)
    await context.database["schedules"].update_one(
        {"_id": due["schedule_id"]}, {"$set": {"next_run": due["fire_time"], "anchor": anchor}}
    )
    beat.start("beat")
    for schedule, row in zip(schedules, rows, strict=True):
        found = await asyncio.to_thread(made, fires, schedule, 1)
        assert [fire["task_id"] for fire in found] == [row["task_id"]]
        await asyncio.to_thread(each_once, operator, records, found)
    moved = await context.schedules.get(due["schedule_id"])
    assert moved["next_run"] == due["fire_time"] + timedelta(hours=1)
    assert [len(rows_of(fires, schedule)) for schedule in schedules] == [1, 1, 1]


async def missed(context: Context, schedule: dict[str, Any]) -> datetime:
    """Make a schedule one that was last looked at two hours ago; answers its anchor."""
    anchor = present() - timedelta(seconds=7500)
    await context.database["schedules"].update_one(
        {"_id": ObjectId(schedule["id"])},
        {"$set": {"anchor": anchor, "next_run": anchor + timedelta(seconds=600)}},
    )
    return anchor


async def test_what_was_missed_while_no_beat_ran_follows_catch_up(
    operator: httpx.Client, fires: Any, context: Context, records: redis.Redis, beat: Supervisor
) -> None:
    schedules = {name: create(operator, interval=600, catch_up=name) for name in ("none", "last", "all")}
    anchors = {name: await missed(context, schedule) for name, schedule in schedules.items()}
    beat.start("beat")
    for name, numbers in {"none": [], "last": [12], "all": list(range(1, 13))}.items():
        schedule, anchor = schedules[name], anchors[name]
        key = ObjectId(schedule["id"])
        for _ in range(600):
            moved = await context.schedules.get(key)
            if moved["next_run"] > present() and not rows_of(fires, schedule, "pending"):
                break
            await asyncio.sleep(0.05)
        assert moved["next_run"] == anchor + timedelta(seconds=13 * 600)
        rows = rows_of(fires, schedule)
        assert [row["fire_time"] for row in rows] == [anchor + timedelta(seconds=number * 600) for number in numbers]
        await asyncio.to_thread(each_once, operator, records, rows)


@pytest.mark.timeout(180)
def test_a_fire_at_which_the_broker_is_away_is_made_later_once(
    stack: Stack, operator: httpx.Client, fires: Any
) -> None:
    supervisor = Supervisor(stack.layout)
    schedule = create(operator, interval=2)
    supervisor.stop(["rabbitmq"])
    try:
        wait_until(lambda: [row for row in rows_of(fires, schedule, "pending") if row["tries"]], 60)
    finally:
        supervisor.start("rabbitmq")
    wait_until(stack.settled, 90)
    rows = at_rest(operator, fires, schedule)
    without_gap(rows, 2 * SECOND)
    assert {row["status"] for row in rows} == {"published"}
    assert max(row["tries"] for row in rows) >= 1
    for row in rows:
        document = finished(operator, row["task_id"])
        assert (document["status"], document["attempts"]) == ("SUCCESS", 1)


@pytest.mark.timeout(180)
def test_mongodb_away_and_back_loses_no_fire(stack: Stack, operator: httpx.Client, fires: Any) -> None:
    supervisor = Supervisor(stack.layout)
    schedule = create(operator, interval=1)
    made(fires, schedule, 1)
    supervisor.stop(["database"])
    supervisor.start("database")
    wait_until(stack.settled, 60)
    made(fires, schedule, len(rows_of(fires, schedule)) + 2)
    without_gap(at_rest(operator, fires, schedule))


async def test_a_schedule_whose_fires_are_stuck_plans_no_more(
    operator: httpx.Client, context: Context, beat: Supervisor
) -> None:
    assert beat
    schedule = create(operator, interval=1)
    key = ObjectId(schedule["id"])
    base = {"schedule_id": key, "task": WORDS["task"], "payload": "{}", "owner": ""}
    moment = present() - timedelta(days=1)
    await context.fires.add(
        [{**base, "fire_time": moment + n * SECOND, "task_id": str(uuid4())} for n in range(WAITING_MAX)]
    )
    await context.database["schedule_fires"].update_many(
        {"schedule_id": key}, {"$set": {"retry_at": present() + timedelta(hours=1)}}
    )
    await context.database["schedules"].update_one({"_id": key}, {"$set": {"next_run": moment}})
    loop = Schedules(context.schedules, context.fires, context.tasks, context.settings)
    await loop.round()
    assert await context.fires.waiting(key, 2 * WAITING_MAX) == WAITING_MAX
    assert (await context.schedules.get(key))["next_run"] == moment
    await context.database["schedule_fires"].delete_many({"schedule_id": key})
    await loop.round()
    assert (await context.schedules.get(key))["next_run"] > present() - SECOND


async def test_a_fire_of_a_task_that_is_gone_is_refused_and_holds_up_nothing(
    operator: httpx.Client, fires: Any, context: Context
) -> None:
    schedule = create(operator, interval=3600)
    fire = {"schedule_id": ObjectId(schedule["id"]), "payload": '{"text":"a"}', "owner": ""}
    await context.fires.add(
        [
            {**fire, "fire_time": present(), "task": "light.gone", "task_id": str(uuid4())},
            {**fire, "fire_time": present() + SECOND, "task": WORDS["task"], "task_id": str(uuid4())},
        ]
    )
    await asyncio.to_thread(made, fires, schedule, 1)
    shown = operator.get(f"/api/schedules/{schedule['id']}").json()["fires"]
    assert [(row["status"], row["message"]) for row in shown] == [
        ("published", ""),
        ("refused", "There is no such task any more."),
    ]


async def test_a_schedule_that_cannot_be_read_any_more_holds_up_nothing(
    operator: httpx.Client, fires: Any, context: Context
) -> None:
    broken, gone = create(operator, crontab="* * * * * *"), create(operator, interval=3600)
    schedules = context.database["schedules"]
    await schedules.update_one({"_id": ObjectId(broken["id"])}, {"$set": {"timezone": "Mars/Olympus"}})
    await schedules.update_one({"_id": ObjectId(gone["id"])}, {"$set": {"task": "light.gone"}})
    whole = create(operator, interval=1)
    await asyncio.to_thread(made, fires, whole, 2)
    shown = {row["id"]: row for row in operator.get("/api/schedules").json()["schedules"]}
    assert (shown[broken["id"]]["timezone"], shown[gone["id"]]["task"]) == ("Mars/Olympus", "light.gone")
    patched = operator.patch(f"/api/schedules/{gone['id']}", json={"enabled": False})
    assert problem(patched, 422, "invalid")["errors"][0]["loc"] == ["body", "task"]


def test_a_schedule_can_fire_jobs(operator: httpx.Client, fires: Any) -> None:
    schedule = create(operator, task="jobs.run", payload={"name": "each second"}, interval=1)
    task_ids = [row["task_id"] for row in made(fires, schedule, 2)]
    at_rest(operator, fires, schedule)

    def jobs() -> list[dict[str, Any]]:
        rows = operator.get("/jobs", params={"status": "COMPLETED", "limit": 100}).json()
        return [row for row in rows if row["task_id"] in task_ids]

    wait_until(lambda: len(jobs()) == 2)
    assert {row["name"] for row in jobs()} == {"each second"}


@pytest.mark.parametrize(
    "change",
    [
        {"task": "light.unknown", "interval": 1},
        {"payload": {"words": "a"}, "interval": 1},
        {"crontab": "61 * * * *"},
        {"crontab": "every now and then"},
        {"crontab": "* * * * *", "timezone": "Mars/Olympus"},
        {"crontab": "* * * * *", "interval": 1},
        {"interval": 0},
        {},
    ],
)
def test_what_cannot_fire_is_refused(operator: httpx.Client, change: dict[str, Any]) -> None:
    document = problem(operator.post("/api/schedules", json={**WORDS, **change}), 422, "invalid")
    assert document["errors"]


def test_a_change_names_its_version(operator: httpx.Client) -> None:
    schedule = create(operator, interval=3600)
    path = f"/api/schedules/{schedule['id']}"
    tag = operator.get(path).headers["etag"]
    changed = operator.patch(path, json={"name": "other"}, headers={"If-Match": tag})
    assert (changed.json()["name"], changed.json()["next_run"]) == ("other", schedule["next_run"])
    for call in (operator.patch, operator.put):
        stale = call(path, json={**WORDS, "interval": 5}, headers={"If-Match": tag})
        problem(stale, 412, "precondition-failed")
    problem(operator.delete(path, headers={"If-Match": tag}), 412, "precondition-failed")
    replaced = operator.put(path, json={**WORDS, "crontab": "0 9 * * *"}, headers={"If-Match": changed.headers["etag"]})
    assert (replaced.json()["interval"], replaced.json()["crontab"]) == (None, "0 9 * * *")
    problem(operator.patch(path, json={"crontab": None}), 422, "invalid")
    back = operator.patch(path, json={"crontab": None, "interval": 60})
    assert (back.json()["interval"], back.json()["version"]) == (60, 4)
    assert operator.delete(path, headers={"If-Match": back.headers["etag"]}).status_code == 204
    problem(operator.patch(path, json={"name": "late"}), 404, "not-found")


def test_the_same_request_makes_one_schedule_and_changes_it_once(stack: Stack, operator: httpx.Client) -> None:
    key = {"Idempotency-Key": uuid4().hex}
    first, again = (operator.post("/api/schedules", json={**WORDS, "interval": 9}, headers=key) for _ in range(2))
    assert first.json() == again.json()
    assert again.headers["idempotent-replayed"] == "true"
    problem(operator.post("/api/schedules", json={**WORDS, "interval": 8}, headers=key), 422, "key-reused")
    # As nginx repeats it on the next replica.
    edge = {"X-Edge-Request-Id": uuid4().hex, "If-Match": '"1"', **dict(operator.headers)}
    path = f"/api/schedules/{first.json()['id']}"
    answers = [httpx.patch(f"{url}{path}", json={"interval": 7}, headers=edge) for url in stack.replicas]
    assert [(answer.status_code, answer.json()["version"]) for answer in answers] == [(200, 2), (200, 2)]
    edge = {**edge, "X-Edge-Request-Id": uuid4().hex, "If-Match": '"2"'}
    assert [httpx.delete(f"{url}{path}", headers=edge).status_code for url in stack.replicas] == [204, 204]
    problem(operator.delete(path), 404, "not-found")


def test_the_list_has_pages(operator: httpx.Client) -> None:
    made_ids = [create(operator, interval=3600, name=f"{number}")["id"] for number in range(5)]
    seen, link = [], "/api/schedules?limit=2"
    while link:
        answer = operator.get(link)
        seen += [row["id"] for row in answer.json()["schedules"]]
        link = answer.links.get("next", {}).get("url")
    # Two replicas make ids that are in order by the second only.
    assert sorted(seen) == sorted(made_ids)


def test_schedules_are_for_operators(stack: Stack, api: httpx.Client) -> None:
    problem(api.get("/api/schedules"), 401, "unauthorized")
    problem(api.post("/api/schedules", json={**WORDS, "interval": 1}), 401, "unauthorized")
    problem(api.get("/api/schedules", headers=bearer(new_key(stack))), 403, "forbidden")


@pytest.mark.parametrize("schedule_id", ["nothing", "6b01dbe84b1dab194c38e6e9"])
def test_an_unknown_schedule_is_not_found(operator: httpx.Client, schedule_id: str) -> None:
    problem(operator.get(f"/api/schedules/{schedule_id}"), 404, "not-found")
    problem(operator.patch(f"/api/schedules/{schedule_id}", json={"name": "a"}), 404, "not-found")
    problem(operator.delete(f"/api/schedules/{schedule_id}"), 404, "not-found")


def test_a_beat_that_hangs_and_wakes_up_doubles_nothing(
    stack: Stack, operator: httpx.Client, fires: Any, records: redis.Redis
) -> None:
    stack.run("scale", "beat=2")
    try:
        schedule = create(operator, interval=1)
        made(fires, schedule, 1)
        for name in ("beat", "beat-2"):
            process = psutil.Process(stack.pid(name))
            process.send_signal(signal.SIGSTOP)
            try:
                made(fires, schedule, len(rows_of(fires, schedule)) + 2)
            finally:
                process.send_signal(signal.SIGCONT)
        rows = at_rest(operator, fires, schedule)
        without_gap(rows)
        each_once(operator, records, rows)
    finally:
        wait_until(stack.settled, 60)
        stack.run("scale", "beat=1")
