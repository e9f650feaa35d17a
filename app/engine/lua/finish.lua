-- A run ended for good: record, Celery's own result, archive and notice in one step.
-- KEYS …, meta   ARGV id, epoch, retries, publish, run, status, meta, meta ttl s, field, value, ...
-- Answers the status written | 'lost' (ended otherwise, or another run has taken over) | 'missing'
local meta = KEYS[6]
local status = redis.call('HGET', task, 'status')
if not status then return 'missing' end
local mine = holds(ARGV[2], ARGV[3], ARGV[4], ARGV[5])
-- Our own call, repeated because its answer was lost.
if mine and status == ARGV[6] and tonumber(ARGV[5]) then return status end
if not mine or not RUNNING[status] then return 'lost' end
if ARGV[6] == 'SUCCESS' then redis.call('HDEL', task, 'error') end
finalise(ARGV[1], ARGV[6], unpack(ARGV, 9))
redis.call('SETEX', meta, ARGV[8], ARGV[7])
redis.call('PUBLISH', meta, ARGV[7])
return ARGV[6]
