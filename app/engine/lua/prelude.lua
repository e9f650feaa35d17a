-- Shared by all scripts: put before each by state.py, which gives each of them these keys.
local task, waiting, drain, finished, open = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]

local FINAL = { SUCCESS = true, FAILURE = true, CANCELLED = true }
local RUNNING = { STARTED = true, PROGRESS = true }
local DRAIN_WINDOW = 10000 -- ms

-- Milliseconds since the epoch by Redis's clock, the only clock that orders transitions.
local function now()
    local time = redis.call('TIME')
    return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Every visible change of a record has a version, and is announced on the channel of the record's name.
local function bump()
    local version = redis.call('HINCRBY', task, 'version', 1)
    redis.call('PUBLISH', task, version)
end

-- A run is known by its epoch (how often the task was reopened), its retries, the publish that it came by, and which
-- start of the record it is; or by its worker, where that is not known (a worker's parent, whose child was killed).
local function holds(epoch, retries, publish, run)
    local record = redis.call('HMGET', task, 'epoch', 'retries', 'publish', 'attempts', 'worker')
    return record[1] == epoch and record[2] == retries and record[3] == publish and (record[4] == run or record[5] == run)
end

-- Ids that wait in a queue, scored by when they stop counting: the end of the lease until the broker has confirmed.
local function wait(id, score)
    redis.call('ZADD', waiting, score, id)
end

-- When the reconciler is to look at a task that has not ended.
local function look(id, at)
    redis.call('ZADD', open, at, id)
end

-- Whether that time has come, and nobody has looked since.
local function due(id, time)
    local at = redis.call('ZSCORE', open, id)
    return at and tonumber(at) <= time
end

-- A task has left its queue for a worker: counted in windows, of which the last whole one and the present one are kept.
local function left_queue(id, time)
    if redis.call('ZREM', waiting, id) == 0 then return end
    local counts = redis.call('HMGET', drain, 'since', 'count')
    local age = time - (tonumber(counts[1]) or 0)
    if age >= DRAIN_WINDOW then
        local previous = age < 2 * DRAIN_WINDOW and counts[2] or 0
        redis.call('HSET', drain, 'since', time, 'previous', previous, 'count', 1)
    else
        redis.call('HINCRBY', drain, 'count', 1)
    end
end

-- Tasks a second that leave the queue, as a string; '0' if none has in the last two windows.
local function drain_rate(time)
    local counts = redis.call('HMGET', drain, 'since', 'count', 'previous')
    local age = time - (tonumber(counts[1]) or 0)
    if age >= 2 * DRAIN_WINDOW then return '0' end
    return tostring(1000 * (counts[2] + (counts[3] or 0)) / (DRAIN_WINDOW + age))
end

-- Nobody else publishes the task until the lease is over; then the reconciler does, or a repeat of the request.
local function lease(id, time, length, publish)
    redis.call('HSET', task, 'lease', time + length, 'lease_by', publish)
    redis.call('HINCRBY', task, 'publishes', 1)
    wait(id, time + length)
    look(id, time + length)
end

-- A final task begins anew; messages of the old epoch are void.
local function reopened()
    redis.call('HINCRBY', task, 'epoch', 1)
    redis.call('HSET', task, 'status', 'PENDING', 'retries', 0, 'starts', 0)
    redis.call('HDEL', task, 'error', 'reason', 'unreplayed', 'started_at', 'finished_at', 'unpublished', 'looks', 'current',
        'total')
    redis.call('PERSIST', task)
end

-- A message tells of an epoch that the record knows nothing of: Redis has lost its last second, and with it a reopening.
local function catch_up(epoch)
    reopened()
    redis.call('HSET', task, 'epoch', epoch)
end

-- The one way into a final state: the archive hears of it in the same step.
local function finalise(id, status, ...)
    redis.call('HSET', task, 'status', status, 'finished_at', now(), ...)
    redis.call('HDEL', task, 'lease', 'lease_by', 'due_at', 'cancel', 'lost')
    redis.call('ZREM', waiting, id)
    redis.call('ZREM', open, id)
    redis.call('XADD', finished, '*', 'id', id)
    bump()
end
