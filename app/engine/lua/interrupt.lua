-- A run was ended from outside and its message is to come again; if it does not, the reconciler is to publish it.
-- ARGV id, epoch, retries, publish, worker, ms until the next look
local status = redis.call('HGET', task, 'status')
-- Its message may have come to another worker by now, whose run lives.
if RUNNING[status] and holds(ARGV[2], ARGV[3], ARGV[4], ARGV[5]) then
    redis.call('HSET', task, 'lost', 1)
    redis.call('HINCRBY', task, 'starts', -1) -- it is not to blame for this one
    look(ARGV[1], now() + ARGV[6])
end
