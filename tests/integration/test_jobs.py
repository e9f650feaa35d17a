"""Jobs: each way in which one ends, and what is kept of it."""

import asyncio
import signal
import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import httpx
import psutil
import pymongo
import pytest
import redis

from app.context import Context
from app.contracts import RunJob, TaskName
from app.database import JobLog, new_job
from app.database.documents import present
from app.engine.jobs import job_of
from deploy.native.supervision import Supervisor
from tests.integration.harness import Stack, bearer, new_key, problem, replica, wait_until

pytestmark = pytest.mark.integration

PAYLOAD = {"lamp": 7, "chair": {"of": "wood"}}
NAMES = ["fetch", "transform", "store"]
ENDED = {"COMPLETED", "FAILED"}


def create(api: httpx.Client, name: str = "nightly", path: str = "/jobs", **rehearsal: Any) -> dict[str, Any]:
    answer = api.post(path, json={"name": name, "payload": PAYLOAD, "rehearsal": rehearsal})
    assert answer.status_code == 202, answer.text
    return answer.json()


def look(api: httpx.Client, job_id: str) -> dict[str, Any]:
    return api.get(f"/jobs/{job_id}").raise_for_status().json()


def ended(api: httpx.Client, job_id: str, seconds: float = 60) -> dict[str, Any]:
    def final() -> dict[str, Any] | None:
        job = look(api, job_id)
        return job if job["status"] in ENDED else None

    return wait_until(final, seconds)


def in_step(api: httpx.Client, job_id: str, number: int, seconds: float = 30) -> dict[str, Any]:
    def there() -> dict[str, Any] | None:
        steps = look(api, job_id)["steps"]
        return steps[-1] if len(steps) == number and steps[-1]["status"] == "IN_PROGRESS" else None

    return wait_until(there, seconds)


def states(job: dict[str, Any]) -> list[str]:
    return [step["status"] for step in job["steps"]]


def timeless(job: dict[str, Any]) -> dict[str, Any]:
    """What two jobs of the same body have in common at their end."""
    steps = [{key: value for key, value in step.items() if not key.endswith("_at")} for step in job["steps"]]
    return {
        **{key: value for key, value in job.items() if not key.endswith(("_at", "_id"))},
        "steps": steps,
    }


@pytest.fixture
def undisturbed(api: httpx.Client) -> dict[str, Any]:
    return timeless(ended(api, create(api)["job_id"]))


@pytest.fixture
def jobs(stack: Stack) -> Any:
    with pymongo.MongoClient(stack.settings.mongodb_url.get_secret_value(), tz_aware=True) as client:
        yield client["stack"]


@pytest.mark.parametrize("path", ["/jobs", "/api/jobs"])
def test_a_job_ends_with_three_steps(api: httpx.Client, jobs: Any, path: str) -> None:
    answer = api.post(path, json={"name": "nightly", "payload": PAYLOAD})
    assert answer.status_code == 202
    accepted = answer.json()
    assert accepted.keys() == {"job_id", "task_id", "status", "message"}
    assert accepted["status"] == "PENDING"
    assert accepted["job_id"] != accepted["task_id"]
    assert answer.headers["location"] == f"{path}/{accepted['job_id']}"
    job = ended(api, accepted["job_id"])
    assert api.get(answer.headers["location"]).json() == job
    assert (job["status"], job["name"], job["task_id"]) == ("COMPLETED", "nightly", accepted["task_id"])
    assert [(step["step_number"], step["name"], step["status"]) for step in job["steps"]] == [
        (number, name, "COMPLETED") for number, name in enumerate(NAMES, start=1)
    ]
    moments = [moment for step in job["steps"] for moment in (step["started_at"], step["completed_at"])]
    assert moments == sorted(moments)
    assert job["result"]["rows"] == 2
    output = jobs["job_outputs"].find_one({"_id": job["job_id"]})
    assert output["checksum"] == job["result"]["checksum"]


def test_a_step_is_told_when_it_begins(api: httpx.Client) -> None:
    job_id = create(api, seconds=0.7)["job_id"]
    step = in_step(api, job_id, 2)
    assert step["started_at"]
    assert step["completed_at"] is None
    assert look(api, job_id)["status"] == "IN_PROGRESS"
    assert states(ended(api, job_id)) == ["COMPLETED"] * 3


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_failing_step_leaves_the_later_ones_unwritten(api: httpx.Client, number: int) -> None:
    job = ended(api, create(api, step=number, permanent=True)["job_id"])
    assert job["status"] == "FAILED"
    assert job["message"] == f"Step {number} was asked to fail in run 1."
    assert states(job) == ["COMPLETED"] * (number - 1) + ["FAILED"]
    assert job["steps"][-1]["message"] == job["message"]
    assert job["steps"][-1]["completed_at"] == job["completed_at"]


def test_a_step_that_fails_once_is_tried_again_and_the_ones_before_are_not(
    api: httpx.Client, undisturbed: dict[str, Any]
) -> None:
    job_id = create(api, step=2, failures=1)["job_id"]
    first = wait_until(lambda: [s for s in look(api, job_id)["steps"] if s["status"] == "COMPLETED"])[0]
    job = ended(api, job_id)
    assert timeless(job) == undisturbed
    assert job["steps"][0] == first


def test_a_job_whose_attempts_are_exhausted_has_failed_and_its_replay_goes_on_where_it_was(
    stack: Stack, api: httpx.Client, undisturbed: dict[str, Any]
) -> None:
    accepted = create(api, step=2, failures=4)
    job = ended(api, accepted["job_id"])
    assert (job["status"], states(job)) == ("FAILED", ["COMPLETED", "FAILED"])
    assert job["message"] == "Step 2 was asked to fail in run 4."
    replay(stack, api, accepted["task_id"], "exhausted")
    again = wait_until(lambda: (found := look(api, accepted["job_id"]))["status"] == "COMPLETED" and found)
    assert timeless(again) == undisturbed
    assert again["steps"][0] == job["steps"][0]


def replay(stack: Stack, api: httpx.Client, task_id: str, reason: str) -> None:
    admin = bearer(new_key(stack, "--admin"))

    def letter() -> dict[str, Any] | None:
        letters = api.get("/api/dead-letters?limit=100", headers=admin).json()["dead_letters"]
        return next((row for row in letters if row["task_id"] == task_id), None)

    found = wait_until(letter)
    assert found["reason"] == reason
    assert api.post(f"/api/dead-letters/{found['id']}/replay", headers=admin).status_code == 202


def test_a_replay_that_fails_again_ends_failed_again(stack: Stack, api: httpx.Client) -> None:
    accepted = create(api, step=3, failures=2, permanent=True)
    assert ended(api, accepted["job_id"])["message"].endswith("run 1.")
    replay(stack, api, accepted["task_id"], "permanent")
    job = wait_until(lambda: (found := look(api, accepted["job_id"]))["message"].endswith("run 2.") and found)
    assert (job["status"], states(job)) == ("FAILED", ["COMPLETED", "COMPLETED", "FAILED"])
    replay(stack, api, accepted["task_id"], "permanent")
    assert wait_until(lambda: look(api, accepted["job_id"])["status"] == "COMPLETED")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_worker_that_is_killed_in_a_step_costs_that_step_alone(
    stack: Stack, api: httpx.Client, jobs: Any, undisturbed: dict[str, Any], number: int
) -> None:
    accepted = create(api, seconds=1)
    before = in_step(api, accepted["job_id"], number)
    kept = look(api, accepted["job_id"])["steps"][:-1]
    for process in stack.processes("heavy-1")[::-1]:
        process.send_signal(signal.SIGKILL)
    job = ended(api, accepted["job_id"])
    assert timeless(job) == undisturbed
    assert job["steps"][: number - 1] == kept
    assert job["steps"][number - 1]["started_at"] > before["started_at"]
    assert api.get(f"/api/async/status/{accepted['task_id']}").json()["attempts"] == 2
    assert jobs["job_steps"].count_documents({"job_id": accepted["job_id"]}) == 3
    wait_until(stack.settled, 60)


@pytest.mark.timeout(180)
def test_a_run_that_was_superseded_writes_no_step(
    stack: Stack, api: httpx.Client, jobs: Any, undisturbed: dict[str, Any]
) -> None:
    """The first worker hangs in step 2, a second one takes the job over and ends it; then the first one wakes up."""
    stack.run("scale", "worker=2")
    accepted = create(api, seconds=1)
    in_step(api, accepted["job_id"], 2)
    with redis.Redis.from_url(stack.settings.redis_url.get_secret_value(), decode_responses=True) as records:
        name = records.hget(f"task:{accepted['task_id']}", "worker").partition("@")[0]
    frozen = stack.processes(name)
    for process in frozen:
        process.send_signal(signal.SIGSTOP)
    try:
        close_connections(stack, frozen[0].pid)
        job = ended(api, accepted["job_id"], 60)
    finally:
        for process in frozen:
            process.send_signal(signal.SIGCONT)
    assert timeless(job) == undisturbed
    rows = list(jobs["job_steps"].find({"job_id": accepted["job_id"]}))
    wait_until(lambda: "superseded" in stack.log(name) or "ignored" in stack.log(name), 60)
    wait_until(stack.settled, 60)
    assert list(jobs["job_steps"].find({"job_id": accepted["job_id"]})) == rows
    assert look(api, accepted["job_id"]) == job
    stack.run("scale", "worker=1")


def close_connections(stack: Stack, pid: int) -> None:
    """Have the broker drop the connections of a process that does not answer."""
    ports = {row.laddr.port for row in psutil.Process(pid).net_connections("tcp")}
    with httpx.Client(base_url=stack.management, auth=("guest", "guest")) as management:
        found = wait_until(
            lambda: [row for row in management.get("/api/connections").json() if row.get("peer_port") in ports]
        )
        for row in found:
            management.delete(f"/api/connections/{row['name']}").raise_for_status()


@pytest.fixture
def logs(jobs: Any) -> Callable[..., JobLog]:
    """Makes runs of one job, as its worker does."""
    task_id = str(uuid4())
    job = new_job(job_id=job_of(task_id), task_id=task_id, name="race", owner="", created_at=present())

    def make(epoch: int = 1) -> JobLog:
        return JobLog(jobs, job, epoch=epoch, retention_days=1)

    make.job = job  # type: ignore[attr-defined]
    return make


def test_of_two_runs_only_the_later_one_writes(logs: Callable[..., JobLog], jobs: Any) -> None:
    first, second = logs(), logs()
    first.claim()
    second.claim()
    assert first.take()
    assert first.begin(1, "fetch")
    assert second.take()
    assert second.begin(1, "fetch")
    assert not first.complete(1, "", "1")
    assert not first.begin(2, "transform")
    assert not first.finish("", "1")
    assert not first.take()
    assert second.complete(1, "", "2")
    (step,) = jobs["job_steps"].find({"job_id": logs.job["job_id"]})  # type: ignore[attr-defined]
    assert (step["result"], step["status"]) == ("2", "COMPLETED")


async def test_no_run_writes_after_its_epoch_has_ended_and_a_replay_does(
    logs: Callable[..., JobLog], context: Context
) -> None:
    repository = context.jobs._jobs  # noqa: SLF001
    job, at = logs.job, present()  # type: ignore[attr-defined]
    run, replayed = logs(epoch=1), logs(epoch=2)
    run.claim()
    assert run.take()
    assert run.begin(1, "fetch")
    for _ in range(2):  # it is told at least once
        assert await repository.fail(job, epoch=1, message="dead", at=at)
    assert not run.complete(1, "", "1")
    assert not run.begin(2, "transform")
    assert [row["status"] for row in await repository.steps(job["job_id"])] == ["FAILED"]
    replayed.claim()
    assert replayed.take()
    assert replayed.begin(1, "fetch")
    # Told once more, late.
    assert not await repository.fail(job, epoch=1, message="dead", at=at)
    assert replayed.complete(1, "", "1")
    assert replayed.finish("done", "1")
    assert not await repository.fail(job, epoch=2, message="cancelled after all was done", at=at)
    assert (await repository.get(job["job_id"]))["status"] == "COMPLETED"


async def test_a_replica_that_dies_before_it_writes_the_document_loses_nothing(
    stack: Stack, api: httpx.Client, context: Context, jobs: Any, undisturbed: dict[str, Any]
) -> None:
    supervisor = Supervisor(stack.layout)
    supervisor.stop(["heavy-1"])
    try:
        task_id = str(uuid4())
        order = RunJob(name="nightly", payload=PAYLOAD)
        await context.tasks.submit(
            TaskName.RUN_JOB, order.model_dump(mode="json"), task_id=task_id, digest="", request_id="dies"
        )
        job = look(api, job_of(task_id))
        assert (job["status"], job["task_id"], job["steps"], job["name"]) == ("PENDING", task_id, [], None)
        assert jobs["jobs"].count_documents({"task_id": task_id}) == 0
    finally:
        supervisor.start("heavy-1")
    assert timeless(await asyncio.to_thread(ended, api, job_of(task_id))) == undisturbed


async def test_a_job_that_is_cancelled_before_anything_wrote_its_document_has_one(
    stack: Stack, api: httpx.Client, context: Context
) -> None:
    supervisor = Supervisor(stack.layout)
    supervisor.stop(["heavy-1"])
    try:
        task_id = str(uuid4())
        order = RunJob(name="never").model_dump(mode="json")
        await context.tasks.submit(TaskName.RUN_JOB, order, task_id=task_id, digest="", request_id="dies")
        assert api.delete(f"/api/async/tasks/{task_id}").status_code == 202
        job = wait_until(lambda: (found := look(api, job_of(task_id)))["name"] == "never" and found)
        assert (job["status"], job["steps"]) == ("FAILED", [])
    finally:
        supervisor.start("heavy-1")


def test_a_cancelled_job_has_failed_in_its_step(api: httpx.Client) -> None:
    accepted = create(api, seconds=2)
    in_step(api, accepted["job_id"], 2)
    assert api.delete(f"/api/async/tasks/{accepted['task_id']}").json()["status"] == "CANCELLING"
    job = ended(api, accepted["job_id"])
    assert (job["status"], states(job)) == ("FAILED", ["COMPLETED", "FAILED"])
    assert "ancelled" in job["message"]
    assert job["steps"][-1]["message"] == job["message"]


def test_a_job_without_mongodb_at_its_submit_is_made_by_its_worker(stack: Stack, api: httpx.Client) -> None:
    supervisor = Supervisor(stack.layout)
    supervisor.stop(["database"])
    try:
        accepted = create(api)
    finally:
        supervisor.start("database")
    assert wait_until(lambda: api.get(f"/jobs/{accepted['job_id']}").status_code == 200)
    assert ended(api, accepted["job_id"])["status"] == "COMPLETED"
    wait_until(stack.settled, 60)


def test_the_same_request_makes_one_job(api: httpx.Client, jobs: Any) -> None:
    key = {"Idempotency-Key": uuid4().hex}
    body = {"name": "once", "payload": {}}
    first, again = (api.post("/jobs", json=body, headers=key) for _ in range(2))
    assert first.json() == again.json()
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    problem(api.post("/jobs", json={**body, "name": "other"}, headers=key), 422, "key-reused")
    assert ended(api, first.json()["job_id"])["status"] == "COMPLETED"
    assert jobs["jobs"].count_documents({"job_id": first.json()["job_id"]}) == 1


def test_nginx_makes_one_job_of_a_request_that_it_repeats(stack: Stack, api: httpx.Client) -> None:
    edge = {"X-Edge-Request-Id": uuid4().hex}
    answers = [httpx.post(f"{url}/jobs", json={"name": "edge"}, headers=edge, timeout=30) for url in stack.replicas]
    assert answers[0].json() == answers[1].json()
    assert ended(api, answers[0].json()["job_id"])["status"] == "COMPLETED"


@pytest.mark.timeout(240)
def test_replicas_that_are_killed_while_jobs_come_in_lose_none(stack: Stack, api: httpx.Client) -> None:
    accepted = []
    for number in range(30):
        if number in (10, 20):
            psutil.Process(stack.pid("api-1")).kill()
        accepted.append(create(api, f"survivor {number}"))
        time.sleep(0.05)
    assert len({row["job_id"] for row in accepted}) == 30
    assert {ended(api, row["job_id"])["status"] for row in accepted} == {"COMPLETED"}
    wait_until(stack.settled, 60)


def test_the_list_has_a_filter_and_pages(stack: Stack, api: httpx.Client) -> None:
    key = bearer(new_key(stack))
    made = []
    for number in range(5):
        rehearsal = {"step": 1, "permanent": True} if number % 2 else {}
        answer = api.post("/jobs", json={"name": f"{number}", "rehearsal": rehearsal}, headers=key)
        made.append(answer.json()["job_id"])
        time.sleep(0.01)  # the order of one millisecond is nobody's

    def all_ended() -> bool:
        return {row["status"] for row in api.get("/jobs", headers=key).json()} == ENDED

    wait_until(all_ended)
    assert [row["job_id"] for row in api.get("/api/jobs", headers=key).json()] == made[::-1]
    for status, expected in (("FAILED", made[3::-2]), ("COMPLETED", made[4::-2]), ("PENDING", [])):
        rows = api.get("/jobs", params={"status": status}, headers=key).json()
        assert [row["job_id"] for row in rows] == expected
    seen, link = [], "/jobs?limit=1&status=COMPLETED"
    while link:
        answer = api.get(link, headers=key)
        seen += [row["job_id"] for row in answer.json()]
        link = answer.links.get("next", {}).get("url")
        assert link is None or link.startswith("/jobs?")
    assert seen == made[4::-2]
    problem(api.get("/jobs?cursor=1"), 422, "invalid")
    problem(api.get("/jobs?status=DONE"), 422, "invalid")


def test_a_job_is_its_owners(stack: Stack, api: httpx.Client) -> None:
    mine, other, admin = bearer(new_key(stack)), bearer(new_key(stack)), bearer(new_key(stack, "--admin"))
    job_id = api.post("/jobs", json={"name": "mine"}, headers=mine).json()["job_id"]
    assert api.get(f"/jobs/{job_id}", headers=mine).status_code == 200
    assert api.get(f"/jobs/{job_id}", headers=admin).status_code == 200
    for stranger in (other, {}):
        problem(api.get(f"/jobs/{job_id}", headers=stranger), 404, "not-found")
        assert job_id not in [row["job_id"] for row in api.get("/jobs?limit=100", headers=stranger).json()]
    assert job_id in [row["job_id"] for row in api.get("/jobs?limit=100", headers=admin).json()]


@pytest.mark.parametrize("job_id", ["837a7479-69eb-4ca4-9b10-871b46642a74", "nothing"])
def test_an_unknown_job_is_not_found(api: httpx.Client, job_id: str) -> None:
    problem(api.get(f"/jobs/{job_id}"), 404, "not-found")


def test_a_task_that_is_no_job_is_none(api: httpx.Client) -> None:
    task_id = api.post("/api/async/count-words", json={"text": "a"}).json()["task_id"]
    problem(api.get(f"/jobs/{job_of(task_id)}"), 404, "not-found")


@pytest.mark.parametrize("path", ["/jobs", "/api/jobs"])
def test_jobs_are_guarded_where_keys_are_required(stack: Stack, path: str) -> None:
    with replica(stack, API_KEYS_REQUIRED="true") as (guarded, _):
        problem(guarded.get(path), 401, "unauthorized")
        problem(guarded.post(path, json={"name": "a"}), 401, "unauthorized")
        assert guarded.get(path, headers=bearer(new_key(stack))).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": ""},
        {"name": "a", "payload": []},
        {"name": "a", "payload": {"$a": 1}},
        {"name": "a", "rehearsal": {"seconds": 61}},
        {"name": "a", "other": 1},
    ],
)
def test_a_body_that_is_no_job_is_refused(api: httpx.Client, body: dict[str, Any]) -> None:
    problem(api.post("/jobs", json=body), 422, "invalid")


def test_the_collections_have_their_indexes(jobs: Any) -> None:
    def keys(collection: str) -> dict[tuple[str, ...], bool]:
        rows = jobs[collection].index_information().values()
        return {tuple(name for name, _ in row["key"]): row.get("unique", False) for row in rows}

    assert keys("jobs") | {("job_id",): True} == keys("jobs")
    assert {("status", "_id"), ("task_id",)} <= keys("jobs").keys()
    assert keys("job_steps")["job_id", "step_number"]
