-- A message has reached a worker: decides whether its task's body runs.
-- ARGV id, epoch, retries, publish, worker, error of a cancel, ms until the run must have ended, name of this call
-- Answers {'run', which start this is} | {'missing'} | {'stale'} | {'duplicate'} | {'stored', result} | {'dead', status, error}
--       | {'republish', retries, ms until due}
local id, epoch, retries, publish, worker = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local record = redis.call('HMGET', task, 'status', 'epoch', 'retries', 'publish', 'result', 'error', 'due_at', 'cancel',
    'started_by', 'attempts')
local status = record[1]
local time = now()

if not status then return { 'missing' } end
-- Our own call, repeated because its answer was lost.
if RUNNING[status] and record[9] == ARGV[8] then return { 'run', record[10] } end
if tonumber(epoch) < tonumber(record[2]) then return { 'stale' } end
if tonumber(epoch) > tonumber(record[2]) then
    catch_up(epoch)
    status, record[3] = 'PENDING', '0'
end
if status == 'SUCCESS' then return { 'stored', record[5] } end
if FINAL[status] then return { 'dead', status, record[6] } end
if tonumber(retries) < tonumber(record[3]) then
    -- The worker died between writing RETRY and acknowledging: whether the next message left nobody knows.
    if status == 'RETRY' and tonumber(retries) + 1 == tonumber(record[3]) then return { 'republish', record[3], tonumber(record[7]) - time } end
    return { 'stale' }
end
-- The same publish again is a redelivery, its worker is gone; another one is a duplicate of a living run.
if RUNNING[status] and retries == record[3] and publish ~= record[4] then return { 'duplicate' } end
if RUNNING[status] and record[8] then
    finalise(id, 'CANCELLED', 'error', ARGV[6])
    return { 'dead', 'CANCELLED', ARGV[6] }
end

redis.call('HSET', task, 'status', 'STARTED', 'epoch', epoch, 'retries', retries, 'publish', publish, 'worker', worker,
    'started_by', ARGV[8])
redis.call('HSETNX', task, 'started_at', time)
redis.call('HINCRBY', task, 'starts', 1)
local run = redis.call('HINCRBY', task, 'attempts', 1)
redis.call('HDEL', task, 'lease', 'lease_by', 'due_at', 'lost', 'looks', 'was_error', 'was_reason')
left_queue(id, time)
look(id, time + ARGV[7])
bump()
return { 'run', run }
