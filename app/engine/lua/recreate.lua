-- A worker holds a message whose record Redis has lost: the record is made again from the message.
-- KEYS task   ARGV field, value, ...
if redis.call('EXISTS', KEYS[1]) == 0 then
    redis.call('HSET', KEYS[1], 'status', 'PENDING', 'attempts', 0, 'publishes', 1, unpack(ARGV))
    bump(KEYS[1])
end
