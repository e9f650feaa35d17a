-- A run was ended from outside and its message is to come again; if it does not, the reconciler is to publish it.
-- ARGV id, epoch, retries, publish, worker, ms until the next look
local record = redis.call('HMGET', task, 'status', 'worker')
-- Its message may have come to another worker by now, whose run lives.
if RUNNING[record[1]] and record[2] == ARGV[5] and holds(ARGV[2], ARGV[3], ARGV[4], '0') then
    redis.call('HSET', task, 'lost', 1)
    look(ARGV[1], now() + ARGV[6])
end
