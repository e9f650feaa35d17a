-- The reconciler finds nothing wrong with a task that waits, and looks again later.
-- ARGV id, how often it was looked at before, ms until the next look
local record = redis.call('HMGET', task, 'status', 'looks')
if not record[1] or FINAL[record[1]] then
    redis.call('ZREM', open, ARGV[1])
elseif (record[2] or '0') == ARGV[2] then
    redis.call('HINCRBY', task, 'looks', 1)
    look(ARGV[1], now() + ARGV[3])
end
