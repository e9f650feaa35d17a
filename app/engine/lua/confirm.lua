-- The broker has the message: the lease is over.
-- ARGV id, publish, ms until the next look
if redis.call('HGET', task, 'lease_by') == ARGV[2] then
    wait(ARGV[1], '+inf')
    look(ARGV[1], now() + ARGV[3])
    redis.call('HDEL', task, 'lease', 'lease_by')
end
