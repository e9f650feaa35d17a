-- The reconciler has found a task whose message seems lost, and publishes it again under a name of its own.
-- ARGV id, publish, lease ms, ms until the next look
-- Answers 1, or nil where the task has ended, or another hand has seen to it meanwhile.
local status = redis.call('HGET', task, 'status')
local time = now()
if not status or FINAL[status] or not due(ARGV[1], time) then return false end
if status == 'PENDING' then
    lease(ARGV[1], time, tonumber(ARGV[3]), ARGV[2])
elseif RUNNING[status] then
    -- Should its run live after all, it is no longer the record's; the new message's start takes over.
    redis.call('HSET', task, 'publish', ARGV[2])
end
redis.call('HINCRBY', task, 'looks', 1)
redis.call('HDEL', task, 'lost')
look(ARGV[1], time + ARGV[4])
return 1
