-- A message is at hand whose record Redis has lost: the record is made again from the message.
-- ARGV id, ms until the next look, field, value, ...
if redis.call('EXISTS', task) == 0 then
    redis.call('HSET', task, 'status', 'PENDING', 'attempts', 0, 'publishes', 1, unpack(ARGV, 3))
    look(ARGV[1], now() + ARGV[2])
    bump()
end
