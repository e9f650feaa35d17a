-- ARGV epoch, retries, publish, run, current, total
-- Answers 'go' | 'cancel' | 'lost' (another run has taken over) | 'missing'
local record = redis.call('HMGET', task, 'status', 'cancel')
if not record[1] then return 'missing' end
if not RUNNING[record[1]] or not holds(ARGV[1], ARGV[2], ARGV[3], ARGV[4]) then return 'lost' end
redis.call('HSET', task, 'status', 'PROGRESS', 'current', ARGV[5], 'total', ARGV[6])
bump()
return record[2] and 'cancel' or 'go'
