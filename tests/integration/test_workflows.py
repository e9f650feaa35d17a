"""Workflows: each ends as its definition says, whatever happens on the way."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any
from uuid import uuid4

import httpx
import psutil
import pymongo
import pytest
import redis

from app.context import Context
from app.database import ResultReader
from app.engine.state import TaskStore
from app.tasks.dataset import values
from deploy.native.supervision import Supervisor
from tests.integration.harness import Stack, bearer, command, new_key, problem, replica, wait_until
from tests.integration.workflows import Trip, Wide

pytestmark = pytest.mark.integration

ENDED = {"SUCCESS", "FAILURE", "CANCELLED"}
STEPS = ("account", "mailbox", "badge", "laptop", "welcome")


@pytest.fixture
def database(stack: Stack) -> Iterator[Any]:
    with pymongo.MongoClient(stack.settings.mongodb_url.get_secret_value()) as client:
        yield client["stack"]


def begin(api: httpx.Client, kind: str, **request: Any) -> str:
    answer = api.post(f"/api/workflows/{kind}", json=request)
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == answer.json()["status_url"]
    return answer.json()["workflow_id"]


def look(api: httpx.Client, workflow_id: str) -> dict[str, Any]:
    return api.get(f"/api/workflows/{workflow_id}").raise_for_status().json()


def ended(api: httpx.Client, workflow_id: str, seconds: float = 30) -> dict[str, Any]:
    """A workflow's document once it has ended."""

    def done() -> dict[str, Any] | None:
        document = look(api, workflow_id)
        return document if document["status"] in ENDED else None

    return wait_until(done, seconds)


def reaches(api: httpx.Client, workflow_id: str, name: str, status: str, place: str = "members") -> None:
    """Wait until a member (or an undo) has this status."""
    wait_until(lambda: look(api, workflow_id)[place].get(name, {}).get("status") == status)


def newcomer(**fields: Any) -> dict[str, Any]:
    return {"name": "Ada", "email": f"{uuid4().hex}@example.com", **fields}


def states(tasks: dict[str, Any]) -> dict[str, str]:
    return {name: one["status"] for name, one in tasks.items()}


def noted(records: redis.Redis, workflow_id: str) -> list[str]:
    return records.lrange(f"noted:{workflow_id}", 0, -1)


async def created(context: Context, kind: str, request: Any) -> dict[str, Any]:
    """A workflow that is written and that nobody has driven on yet."""
    document, new = await context.conductor.create(
        kind, request, workflow_id=str(uuid4()), owner="", digest="d", request_id="r"
    )
    assert new
    return document


def provided(database: Any, email: str) -> Any:
    """What is left of a newcomer, without what differs from one to the next."""
    person = database["newcomers"].find_one({"_id": email})
    return person and (sorted(person["provided"]), sorted(person["log"]))


def test_onboarding_gives_a_newcomer_everything_once(api: httpx.Client, database: Any) -> None:
    request = newcomer()
    document = ended(api, begin(api, "onboarding", **request))
    assert document["status"] == "SUCCESS", document
    assert states(document["members"]) == dict.fromkeys(STEPS, "SUCCESS")
    assert (document["compensations"], document["error"]) == ({}, None)
    assert document["progress"] == {"current": 5, "total": 5, "progress": 100.0}
    person = database["newcomers"].find_one({"_id": request["email"]})
    assert sorted(person["log"]) == ["badge", "laptop", "mail", "mailbox"]
    given = {what: person["provided"][what] for what in ("mailbox", "badge", "laptop")}
    assert document["result"] == {"account": request["email"], **given}
    for one in document["members"].values():
        assert api.get(f"/api/async/status/{one['task_id']}").json()["workflow"] == document["workflow_id"]


def test_a_data_set_is_summarised_in_chunks(api: httpx.Client) -> None:
    document = ended(api, begin(api, "dataset", rows=100_000, seed=7), 90)
    assert document["status"] == "SUCCESS", document["error"]
    every = list(values(7, 0, 100_000))
    histogram = [sum(value // 1000 == column for value in every) for column in range(10)]
    assert document["result"] == {
        "chunks": 50, "count": 100_000, "sum": sum(every), "mean": round(sum(every) / 100_000, 3),
        "min": min(every), "max": max(every), "histogram": histogram,
    }  # fmt: skip
    assert document["progress"] == {"current": 51, "total": 51, "progress": 100.0}


@pytest.mark.parametrize(
    "body", [{"rows": 1_000_000, "chunk": 1}, {"rows": 0}, {"rows": 1_000_001}, {"chunk": 0}, {"files": 1}]
)
def test_a_data_set_that_is_too_large_is_refused(api: httpx.Client, body: dict[str, int]) -> None:
    problem(api.post("/api/workflows/dataset", json=body), 422, "invalid")


def test_what_fails_for_good_is_taken_back(api: httpx.Client, database: Any) -> None:
    request = newcomer(laptop="sold-out")
    document = ended(api, begin(api, "onboarding", **request))
    assert document["status"] == "FAILURE"
    assert (document["error"]["type"], document["error"]["member"]) == ("sold_out", "laptop")
    assert states(document["members"])["laptop"] == "FAILURE"
    assert states(document["members"])["welcome"] == "SKIPPED"
    assert states(document["compensations"])["account"] == "SUCCESS"
    assert set(states(document["compensations"]).values()) == {"SUCCESS"}
    assert document["uncompensated"] == []
    assert provided(database, request["email"]) is None
    # Nothing stands in the way of another attempt.
    assert ended(api, begin(api, "onboarding", **{**request, "laptop": "large"}))["status"] == "SUCCESS"


def test_an_account_of_another_workflow_is_left_alone(api: httpx.Client, database: Any) -> None:
    request = newcomer()
    ended(api, begin(api, "onboarding", **request))
    second = ended(api, begin(api, "onboarding", **request))
    assert (second["status"], second["error"]["type"]) == ("FAILURE", "account_taken")
    assert provided(database, request["email"]) == (
        ["badge", "laptop", "mail", "mailbox"],
        ["badge", "laptop", "mail", "mailbox"],
    )


def test_undos_run_backwards_and_once(api: httpx.Client, records: redis.Redis) -> None:
    workflow_id = begin(api, "test-trip", middle="test.hopeless")
    document = ended(api, workflow_id)
    assert (document["status"], document["error"]["type"]) == ("FAILURE", "hopeless")
    assert noted(records, workflow_id) == ["a", "undo-b", "undo-a"]


def test_an_undo_that_fails_for_good_is_told(api: httpx.Client, records: redis.Redis) -> None:
    workflow_id = begin(api, "test-trip", middle="test.hopeless", undo="test.hopeless")
    document = ended(api, workflow_id)
    assert (document["status"], document["uncompensated"]) == ("FAILURE", ["b"])
    assert document["compensations"]["b"]["error"]["type"] == "hopeless"
    assert noted(records, workflow_id) == ["a", "undo-a"]


@pytest.mark.timeout(240)
def test_a_member_that_kills_its_workers_fails_its_workflow(api: httpx.Client, records: redis.Redis) -> None:
    workflow_id = begin(api, "test-trip", middle="test.poison", failures=99)
    document = ended(api, workflow_id, 180)
    assert (document["status"], document["error"]["type"], document["error"]["member"]) == ("FAILURE", "poison", "b")
    assert noted(records, workflow_id) == ["a", "undo-b", "undo-a"]


def test_a_letter_of_a_member_is_not_replayed_by_itself_and_that_of_an_undo_is(
    stack: Stack, api: httpx.Client, records: redis.Redis
) -> None:
    mark = uuid4().hex
    records.set(f"broken:{mark}", 1)
    document = ended(api, begin(api, "test-trip", middle="test.hopeless", undo="test.mended", mark=mark))
    assert document["uncompensated"] == ["b"]
    admin = bearer(new_key(stack, "--admin"))
    task_ids = [document["members"]["b"]["task_id"], document["compensations"]["b"]["task_id"]]

    def letters() -> dict[str, Any] | None:
        page = api.get("/api/dead-letters?limit=100", headers=admin).json()["dead_letters"]
        found = {letter["task_id"]: letter for letter in page if letter["task_id"] in task_ids}
        return found if len(found) == 2 else None

    member, undo = (wait_until(letters)[task_id] for task_id in task_ids)
    assert member["workflow"] == undo["workflow"] == document["workflow_id"]
    problem(api.post(f"/api/dead-letters/{member['id']}/replay", headers=admin), 409, "conflict")
    told = command(stack, "dead-letters", "replay", member["id"])
    assert told.returncode == 1
    # What takes back may be tried again, and its workflow knows.
    records.delete(f"broken:{mark}")
    assert api.post(f"/api/dead-letters/{undo['id']}/replay", headers=admin).status_code == 202
    wait_until(lambda: look(api, document["workflow_id"])["uncompensated"] == [])
    again = ended(api, document["workflow_id"])
    assert (again["status"], again["error"]["type"]) == ("FAILURE", "hopeless")
    assert again["compensations"]["b"]["status"] == "SUCCESS"


def test_a_cancel_stops_what_runs_and_takes_back_what_was_done(api: httpx.Client, records: redis.Redis) -> None:
    workflow_id = begin(api, "test-trip", middle="test.steps", steps=500)
    reaches(api, workflow_id, "b", "PROGRESS")
    assert look(api, workflow_id)["progress"]["current"] == 1
    answer = api.delete(f"/api/workflows/{workflow_id}")
    assert answer.status_code == 202
    assert answer.json()["status"] in ("COMPENSATING", "CANCELLED")
    document = ended(api, workflow_id)
    assert (document["status"], document["error"]) == ("CANCELLED", None)
    assert states(document["members"]) == {"a": "SUCCESS", "b": "CANCELLED", "c": "SKIPPED"}
    assert noted(records, workflow_id) == ["a", "undo-b", "undo-a"]
    assert api.delete(f"/api/workflows/{workflow_id}").json()["status"] == "CANCELLED"


def test_what_has_ended_otherwise_cannot_be_cancelled(api: httpx.Client) -> None:
    workflow_id = begin(api, "test-trip")
    ended(api, workflow_id)
    problem(api.delete(f"/api/workflows/{workflow_id}"), 409, "conflict")
    for unknown in (uuid4(), "nonsense"):
        problem(api.get(f"/api/workflows/{unknown}"), 404, "not-found")
        problem(api.delete(f"/api/workflows/{unknown}"), 404, "not-found")


def test_a_member_cancelled_by_itself_fails_its_workflow(api: httpx.Client) -> None:
    workflow_id = begin(api, "test-trip", middle="test.steps", steps=500)
    reaches(api, workflow_id, "b", "PROGRESS")
    api.delete(f"/api/async/tasks/{look(api, workflow_id)['members']['b']['task_id']}")
    document = ended(api, workflow_id)
    assert (document["status"], document["error"]["type"], document["error"]["member"]) == ("FAILURE", "cancelled", "b")


def test_a_repeat_with_the_same_key_makes_one_workflow(api: httpx.Client) -> None:
    headers, body = {"Idempotency-Key": uuid4().hex}, {"middle": "test.noted"}
    first, second = (api.post("/api/workflows/test-trip", json=body, headers=headers) for _ in range(2))
    assert first.json()["workflow_id"] == second.json()["workflow_id"]
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    other = api.post("/api/workflows/test-trip", json={"middle": "test.hopeless"}, headers=headers)
    problem(other, 422, "key-reused")


def test_the_same_request_at_another_replica_makes_one_workflow(stack: Stack) -> None:
    headers = {"X-Edge-Request-Id": uuid4().hex}  # as nginx sends it when it tries the next one
    answers = [httpx.post(f"{url}/api/workflows/test-trip", json={}, headers=headers) for url in stack.replicas]
    assert answers[0].json()["workflow_id"] == answers[1].json()["workflow_id"]
    assert {answer.status_code for answer in answers} == {202}
    assert "idempotent-replayed" not in answers[1].headers


def test_a_workflow_belongs_to_the_key_that_made_it(stack: Stack, api: httpx.Client) -> None:
    mine, other, admin = (bearer(new_key(stack, *words)) for words in ((), (), ("--admin",)))
    made = api.post("/api/workflows/test-trip", json={}, headers=mine).json()["workflow_id"]
    for headers, status in ((mine, 200), (other, 404), (admin, 200), ({}, 404)):
        assert api.get(f"/api/workflows/{made}", headers=headers).status_code == status
    assert api.delete(f"/api/workflows/{made}", headers=other).status_code == 404
    wait_until(lambda: api.get(f"/api/workflows/{made}", headers=mine).json()["status"] == "SUCCESS")


def test_no_more_are_taken_in_than_may_be_open(stack: Stack, api: httpx.Client) -> None:
    open_one = begin(api, "test-trip", middle="test.steps", steps=500)
    with replica(stack, WORKFLOWS_MAX="1") as (full, _):
        refused = full.post("/api/workflows/test-trip", json={})
        problem(refused, 503, "workflows-full")
        assert int(refused.headers["retry-after"]) > 0
    api.delete(f"/api/workflows/{open_one}")
    ended(api, open_one)


def test_results_that_only_json_can_say_pass_on(api: httpx.Client) -> None:
    document = ended(api, begin(api, "test-wide", size=3, task="test.odd"))
    assert document["status"] == "SUCCESS", document
    assert document["result"]["m0"] == {"$big": 2**70, "name": "test.odd"}
    assert document["result"]["last"] == "ttt"


async def test_a_crash_between_release_and_submit_is_mended(
    api: httpx.Client, context: Context, records: redis.Redis, database: Any
) -> None:
    workflow_id = (await created(context, "test-trip", Trip()))["workflow_id"]
    released = {"status": "STARTED", "members.a.status": "PENDING"}
    database["workflows"].update_one({"workflow_id": workflow_id}, {"$set": released, "$inc": {"version": 1}})
    assert ended(api, workflow_id)["status"] == "SUCCESS"
    assert noted(records, workflow_id) == ["a", "b", "c"]


async def test_a_cancel_is_not_overtaken_by_a_member_submitted_late(
    stack: Stack, api: httpx.Client, context: Context, records: redis.Redis
) -> None:
    supervisor = Supervisor(stack.layout)
    supervisor.stop(["beat"])
    try:
        document = await created(context, "test-trip", Trip())
        workflow_id = document["workflow_id"]
        late: list[Any] = []
        submit = context.tasks.submit_many

        async def forget(orders: list[Any], **options: Any) -> list[Any]:
            late.append((orders, options))
            return []

        context.tasks.submit_many = forget
        await context.conductor.advance(workflow_id)
        context.tasks.submit_many = submit
        assert (await context.database["workflows"].find_one({"workflow_id": workflow_id}))["status"] == "STARTED"
        assert api.delete(f"/api/workflows/{workflow_id}").status_code == 202
        # The one that was forgotten has ended before it began; its undo runs.
        wait_until(lambda: look(api, workflow_id)["members"]["a"]["status"] == "CANCELLED")
        ((orders, options),) = late
        await submit(orders, **options)
    finally:
        supervisor.start("beat")
    assert ended(api, workflow_id)["status"] == "CANCELLED"
    assert noted(records, workflow_id) == ["undo-a"]


async def test_many_who_drive_it_on_at_once_make_each_member_once(
    stack: Stack, api: httpx.Client, context: Context, records: redis.Redis
) -> None:
    supervisor = Supervisor(stack.layout)
    supervisor.stop(["beat", "light-1"])
    try:
        document = await created(context, "test-wide", Wide(size=20))
        await asyncio.gather(*(context.conductor.advance(document["workflow_id"]) for _ in range(8)))
        ids = [one["task_id"] for name, one in document["members"].items() if name != "last"]
        assert [records.hget(f"task:{task_id}", "publishes") for task_id in ids] == ["1"] * 20
    finally:
        supervisor.start("light-1")
        supervisor.start("beat")
    final = ended(api, document["workflow_id"], 60)
    assert final["status"] == "SUCCESS"
    assert {one["attempts"] for one in final["members"].values()} == {1}


def kill(stack: Stack, service: str) -> None:
    """End a service and all below it at once, as a machine that fails does; its supervisor starts it again."""
    processes = stack.processes(service)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, 10)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("step", STEPS)
def test_a_worker_killed_at_any_step_changes_nothing_in_the_end(
    stack: Stack, api: httpx.Client, database: Any, step: str
) -> None:
    request = newcomer(seconds=0.5)
    workflow_id = begin(api, "onboarding", **request)
    wait_until(lambda: look(api, workflow_id)["members"][step]["status"] in ("STARTED", "PROGRESS"))
    kill(stack, "light-1")
    document = ended(api, workflow_id, 90)
    assert document["status"] == "SUCCESS", document
    assert document["members"][step]["attempts"] > 1
    assert states(document["members"]) == dict.fromkeys(STEPS, "SUCCESS")
    whole = ["badge", "laptop", "mail", "mailbox"]
    assert provided(database, request["email"]) == (whole, whole)


@pytest.mark.timeout(240)
def test_a_worker_killed_while_it_takes_back_changes_nothing_in_the_end(
    stack: Stack, api: httpx.Client, database: Any
) -> None:
    request = newcomer(laptop="sold-out", seconds=0.5)
    workflow_id = begin(api, "onboarding", **request)
    wait_until(lambda: look(api, workflow_id)["compensations"].get("account", {}).get("status") == "PROGRESS", 60)
    kill(stack, "light-1")
    document = ended(api, workflow_id, 90)
    assert (document["status"], document["error"]["type"]) == ("FAILURE", "sold_out")
    assert set(states(document["compensations"]).values()) == {"SUCCESS"}
    assert document["compensations"]["account"]["attempts"] > 1
    assert provided(database, request["email"]) is None


@pytest.mark.timeout(240)
def test_a_worker_killed_amid_a_data_set_changes_no_number(stack: Stack, api: httpx.Client) -> None:
    workflow_id = begin(api, "dataset", rows=200_000, chunk=2_000)
    wait_until(lambda: look(api, workflow_id)["progress"]["current"] > 5)
    kill(stack, "heavy-1")
    document = ended(api, workflow_id, 120)
    assert document["status"] == "SUCCESS", document["error"]
    assert document["result"]["sum"] == sum(values(1, 0, 200_000))
    assert document["result"]["count"] == 200_000


def test_a_beat_killed_in_the_middle_changes_nothing_in_the_end(stack: Stack, api: httpx.Client) -> None:
    workflow_id = begin(api, "onboarding", **newcomer(seconds=0.5))
    reaches(api, workflow_id, "mailbox", "PROGRESS")
    kill(stack, "beat")
    assert ended(api, workflow_id, 90)["status"] == "SUCCESS"


def test_a_broker_that_is_away_delays_a_workflow_and_no_more(
    stack: Stack, api: httpx.Client, records: redis.Redis
) -> None:
    supervisor = Supervisor(stack.layout)
    supervisor.stop(["rabbitmq"])
    try:
        workflow_id = begin(api, "test-trip")
        assert look(api, workflow_id)["status"] in ("PENDING", "STARTED")
    finally:
        supervisor.start("rabbitmq")
    assert ended(api, workflow_id, 90)["status"] == "SUCCESS"
    assert noted(records, workflow_id) == ["a", "b", "c"]


@pytest.mark.timeout(240)
def test_a_redis_that_starts_empty_changes_nothing_in_the_end(
    stack: Stack, api: httpx.Client, database: Any, records: redis.Redis
) -> None:
    request = newcomer(seconds=1)
    workflow_id = begin(api, "onboarding", **request)
    reaches(api, workflow_id, "mailbox", "PROGRESS")
    records.flushall()
    supervisor = Supervisor(stack.layout)
    supervisor.stop(["redis"])
    supervisor.start("redis")
    document = ended(api, workflow_id, 150)
    assert document["status"] == "SUCCESS", document
    whole = ["badge", "laptop", "mail", "mailbox"]
    assert provided(database, request["email"]) == (whole, whole)


@pytest.fixture
def store(stack: Stack, records: redis.Redis) -> Iterator[TaskStore]:
    reader = ResultReader(stack.settings.mongodb_url.get_secret_value(), "stack", timeout=5)
    yield TaskStore(records, reader, celery_result_ttl=60, look_after=60, run_limits={"light": 60})
    reader.close()


@pytest.fixture
def slots(store: TaskStore, records: redis.Redis) -> Iterator[Callable[[float], tuple[bool, int]]]:
    """Reserve a start; answers whether that was done, and when the next one may be, in microseconds."""
    name = f"test.{uuid4().hex}"

    def reserve(patience: float) -> tuple[bool, int]:
        taken, _ = store.reserve(name, 10, patience)
        return taken, int(records.get(f"rate:{name}"))

    yield reserve
    records.delete(f"rate:{name}")


def test_starts_are_reserved_a_tenth_of_a_second_apart(slots: Callable[[float], tuple[bool, int]]) -> None:
    reserved = [slots(60) for _ in range(20)]
    assert all(taken for taken, _ in reserved)
    times = [at for _, at in reserved]
    assert all(later - earlier >= 100_000 for earlier, later in pairwise(times))


def test_a_start_that_is_too_far_off_is_not_reserved(slots: Callable[[float], tuple[bool, int]]) -> None:
    for _ in range(100):
        last = slots(60)
    assert slots(0.001) == (False, last[1])


def test_what_is_put_off_for_its_rate_burns_no_attempt(api: httpx.Client, records: redis.Redis) -> None:
    records.delete("paced", "rate:test.paced")
    document = ended(api, begin(api, "test-wide", size=4, task="test.paced"), 60)
    assert document["status"] == "SUCCESS", document
    paced = [one for name, one in document["members"].items() if name != "last"]
    ids = [one["task_id"] for one in paced]
    assert sorted(records.lrange("paced", 0, -1)) == sorted(ids)
    assert {records.hget(f"task:{task_id}", "retries") for task_id in ids} == {"0"}
    assert max(one["attempts"] for one in paced) > 1
