-- A run was ended from outside and its message is to come again; if it does not, the reconciler is to publish it.
-- ARGV id, epoch, retries, publish, ms until the next look
local status = redis.call('HGET', task, 'status')
if RUNNING[status] and holds(ARGV[2], ARGV[3], ARGV[4], '0') then
    redis.call('HSET', task, 'lost', 1)
    look(ARGV[1], now() + ARGV[5])
end
