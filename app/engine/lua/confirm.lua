-- The broker has the message: the lease is over.
-- KEYS task, waiting   ARGV id, publish
if redis.call('HGET', KEYS[1], 'lease_by') == ARGV[2] then
    wait(KEYS[2], ARGV[1], '+inf')
    redis.call('HDEL', KEYS[1], 'lease', 'lease_by')
end
