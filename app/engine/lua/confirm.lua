-- The broker has the message: the lease is over.
-- KEYS task   ARGV publish
if redis.call('HGET', KEYS[1], 'lease_by') == ARGV[1] then
    redis.call('HDEL', KEYS[1], 'lease', 'lease_by')
end
