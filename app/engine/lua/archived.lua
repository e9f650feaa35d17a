-- MongoDB has the record: it may expire, unless it has changed since it was read; the stream forgets it.
-- KEYS task, finished   ARGV group, entry, version, ttl s
local record = redis.call('HMGET', KEYS[1], 'status', 'version')
if FINAL[record[1]] and record[2] == ARGV[3] then redis.call('EXPIRE', KEYS[1], ARGV[4]) end
redis.call('XACK', KEYS[2], ARGV[1], ARGV[2])
redis.call('XDEL', KEYS[2], ARGV[2])
