-- Creates a record, PENDING under a lease, or tells what an earlier request with the same identity left.
-- ARGV id, digest, lease ms, publish, queue max, backlog max, 1 to create nothing that is not known, field, value, ...
-- Answers {'created', epoch, created_at} | {'leased', ms left} | {'exists', status} | {'conflict'}
--       | {'full', tasks a second that leave the queue} | {'backlog'} | {'unknown'}
local id, digest, length, publish = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local time = now()
local old = redis.call('HMGET', task, 'status', 'digest', 'lease', 'unpublished', 'lease_by')
local status = old[1]

if status then
    if old[2] ~= digest then return { 'conflict' } end
    local leased = status == 'PENDING' and old[3]
    -- Our own call, repeated by the client because its answer was lost.
    if leased and old[5] == publish then
        local run = redis.call('HMGET', task, 'epoch', 'created_at')
        return { 'created', run[1], run[2] }
    end
    if leased and tonumber(old[3]) > time then return { 'leased', tonumber(old[3]) - time } end
    if not leased and not old[4] then return { 'exists', status } end
elseif ARGV[7] == '1' then
    return { 'unknown' }
end
if redis.call('XLEN', finished) >= tonumber(ARGV[6]) then return { 'backlog' } end
if not status or old[4] then
    -- What was never published, because the replica or its connection died, holds no place past its lease. It is removed
    -- below: a script that has begun to write is no longer refused by a full Redis.
    if redis.call('ZCOUNT', waiting, time, '+inf') >= tonumber(ARGV[5]) then return { 'full', drain_rate(time) } end
end

if not status then
    redis.call('HSET', task, 'status', 'PENDING', 'digest', digest, 'retries', 0, 'attempts', 0,
        'created_at', time, unpack(ARGV, 8))
elseif old[4] then
    reopened()
end
lease(id, time, length, publish)
redis.call('ZREMRANGEBYSCORE', waiting, '-inf', time - 1)
bump()
local run = redis.call('HMGET', task, 'epoch', 'created_at')
return { 'created', run[1], run[2] }
