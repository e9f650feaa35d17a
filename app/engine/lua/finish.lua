-- A run ended for good: record, Celery's own result, archive and notice in one step.
-- KEYS task, waiting, finished, meta   ARGV id, epoch, retries, publish, run, status, field, value, meta, meta ttl s
-- Answers the status written | 'lost' (already final, or another run has taken over) | 'missing'
local task, waiting, finished, meta = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local status = redis.call('HGET', task, 'status')
if not status then return 'missing' end
if not RUNNING[status] or not holds(task, ARGV[2], ARGV[3], ARGV[4], ARGV[5]) then return 'lost' end
if ARGV[6] == 'SUCCESS' then redis.call('HDEL', task, 'error') end
finalise(task, waiting, finished, ARGV[1], ARGV[6], ARGV[7], ARGV[8])
redis.call('SETEX', meta, ARGV[10], ARGV[9])
redis.call('PUBLISH', meta, ARGV[9])
return ARGV[6]
