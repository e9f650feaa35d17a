-- MongoDB has the record: it may expire, unless it has changed since it was read; the stream forgets it.
-- ARGV group, entry, version, ttl s
local record = redis.call('HMGET', task, 'status', 'version')
if FINAL[record[1]] and record[2] == ARGV[3] then redis.call('EXPIRE', task, ARGV[4]) end
redis.call('XACK', finished, ARGV[1], ARGV[2])
redis.call('XDEL', finished, ARGV[2])
