-- ARGV id, error
-- Answers nil (unknown) | 'CANCELLED' | 'CANCELLING' (it runs, and stops at its next progress call) | the final status
local status = redis.call('HGET', task, 'status')
if not status or FINAL[status] then return status end
if RUNNING[status] then
    redis.call('HSET', task, 'cancel', 1)
    bump()
    return 'CANCELLING'
end
finalise(ARGV[1], 'CANCELLED', 'error', ARGV[2])
return 'CANCELLED'
