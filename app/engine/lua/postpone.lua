-- The reconciler finds nothing wrong with a task that waits, and looks again later.
-- ARGV id, ms until the next look
local status = redis.call('HGET', task, 'status')
local time = now()
if not status or FINAL[status] then
    redis.call('ZREM', open, ARGV[1])
elseif due(ARGV[1], time) then
    redis.call('HINCRBY', task, 'looks', 1)
    look(ARGV[1], time + ARGV[2])
end
