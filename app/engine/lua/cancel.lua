-- KEYS task, waiting, finished   ARGV id, error
-- Answers nil (unknown) | 'CANCELLED' | 'CANCELLING' (it runs, and stops at its next progress call) | the final status
local task, waiting, finished = KEYS[1], KEYS[2], KEYS[3]
local status = redis.call('HGET', task, 'status')
if not status or FINAL[status] then return status end
if RUNNING[status] then
    redis.call('HSET', task, 'cancel', 1)
    bump(task)
    return 'CANCELLING'
end
finalise(task, waiting, finished, ARGV[1], 'CANCELLED', 'error', ARGV[2])
return 'CANCELLED'
