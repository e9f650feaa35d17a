-- Shared by all scripts: put before each by state.py.

local FINAL = { SUCCESS = true, FAILURE = true, CANCELLED = true }
local RUNNING = { STARTED = true, PROGRESS = true }

-- Milliseconds since the epoch by Redis's clock, the only clock that orders transitions.
local function now()
    local time = redis.call('TIME')
    return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Every visible change of a record has a version, and is announced on the channel of the record's name.
local function bump(task)
    local version = redis.call('HINCRBY', task, 'version', 1)
    redis.call('PUBLISH', task, version)
end

-- A run is known by its epoch (how often the task was reopened), its retries, the publish that it came by, and which
-- start of the record it is. The last is 0 where nobody can say (a worker's parent, whose child was killed).
local function holds(task, epoch, retries, publish, run)
    local record = redis.call('HMGET', task, 'epoch', 'retries', 'publish', 'attempts')
    return record[1] == epoch and record[2] == retries and record[3] == publish and (run == '0' or record[4] == run)
end

-- Ids that wait in a queue, scored by when they stop counting: the end of the lease until the broker has confirmed.
local function wait(waiting, id, score)
    redis.call('ZADD', waiting, score, id)
end

-- The one way into a final state: the archive hears of it in the same step.
local function finalise(task, waiting, finished, id, status, field, value)
    redis.call('HSET', task, 'status', status, 'finished_at', now())
    if field then redis.call('HSET', task, field, value) end
    redis.call('HDEL', task, 'lease', 'lease_by', 'due_at', 'cancel')
    redis.call('ZREM', waiting, id)
    redis.call('XADD', finished, '*', 'id', id)
    bump(task)
end
