-- A run failed and will be tried again: written before the next message is published.
-- KEYS task, waiting, finished   ARGV id, epoch, retries, publish, run, ms until due, error
-- Answers 'RETRY' | 'CANCELLED' (was asked for meanwhile) | 'lost' | 'missing'
local task, waiting, finished = KEYS[1], KEYS[2], KEYS[3]
local record = redis.call('HMGET', task, 'status', 'cancel', 'epoch', 'retries', 'attempts')
if not record[1] then return 'missing' end
-- Our own call, repeated because its answer was lost.
if record[1] == 'RETRY' and record[3] == ARGV[2] and record[4] == tostring(ARGV[3] + 1) and record[5] == ARGV[5] then
    return 'RETRY'
end
if not RUNNING[record[1]] or not holds(task, ARGV[2], ARGV[3], ARGV[4], ARGV[5]) then return 'lost' end
if record[2] then
    finalise(task, waiting, finished, ARGV[1], 'CANCELLED')
    return 'CANCELLED'
end
redis.call('HSET', task, 'status', 'RETRY', 'retries', ARGV[3] + 1, 'due_at', now() + ARGV[6], 'error', ARGV[7])
wait(waiting, ARGV[1], '+inf')
bump(task)
return 'RETRY'
