-- The reconciler has found a task whose message seems lost, and publishes it again under a name of its own.
-- ARGV id, how often it was looked at before, publish, lease ms, ms until the next look
-- Answers 1, or nil where the task has moved on, or another reconciler was faster.
local record = redis.call('HMGET', task, 'status', 'looks')
local status = record[1]
if not status or FINAL[status] or (record[2] or '0') ~= ARGV[2] then return false end
local time = now()
if status == 'PENDING' then
    lease(ARGV[1], time, tonumber(ARGV[4]), ARGV[3])
elseif RUNNING[status] then
    -- Should its run live after all, it is no longer the record's; the new message's start takes over.
    redis.call('HSET', task, 'publish', ARGV[3])
end
redis.call('HINCRBY', task, 'looks', 1)
redis.call('HDEL', task, 'lost')
look(ARGV[1], time + ARGV[5])
return 1
